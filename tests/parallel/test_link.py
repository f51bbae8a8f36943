"""A link carries bytes exactly or says that it did not:
between two real processes over each transport, and within one."""

import ast
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from local_link import LocalLink

from distca.parallel import link as link_module
from distca.parallel.link import BACKWARD, FORWARD, PLAN, REPLY, Damaged, Header, Link, LinkError, pack, unpack
from distca.parallel.nixl_link import NixlLink
from distca.parallel.transport import Transport, make_transport
from distca.transports import nixl_package

ADDRESS, TRAINER, SERVER = "127.0.0.1", 0, 1
LOWEST, HIGHEST = -(2**63), 2**63 - 1
ANSWER_S, WORKERS = 120, 3  # we are worker 0
KINDS = [
    "pairs",
    "group",
    pytest.param("nixl", marks=pytest.mark.skipif(not nixl_package(), reason="needs NIXL: real links over UCX")),
]
ALONE = [KINDS[0], KINDS[2]]  # transports whose links end one by one
words = st.one_of(st.sampled_from([LOWEST, -1, 0, 1, HIGHEST]), st.integers(LOWEST, HIGHEST))
floats = st.floats(allow_nan=False)


# ---- headers and payloads ----


@settings(deadline=None)
@given(st.lists(words, min_size=9, max_size=9), floats, floats, st.lists(words, min_size=3, max_size=3))
def test_a_header_survives_the_wire_whatever_it_holds(integers, scale, softcap, last):
    header = Header(*integers, scale, softcap, *last)
    packed = header.pack()
    assert packed.dtype == torch.uint8 and packed.numel() == link_module.HEADER.size == 160
    assert Header.unpack(packed) == header


@given(st.integers(0, 119), st.integers(0, 7))
def test_any_flipped_bit_of_a_header_is_noticed(byte, bit):
    """A wrong scale or window computes as smoothly as the right one."""
    packed = Header(FORWARD, 3, 5, 7, 0, 8, 2, 64, 1, 0.125, 0.0, 0, 1024, 99).pack()
    packed[byte] ^= 1 << bit
    with pytest.raises(Damaged):
        Header.unpack(packed)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]),
            st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
        ),
        max_size=6,
    )
)
@settings(deadline=None)
def test_unpack_gives_back_what_pack_took(like):
    tensors = [torch.randint(0, 100, shape).to(dtype) for dtype, shape in like]
    payload = pack(tensors)
    assert payload.dtype == torch.uint8 and payload.numel() % link_module.ALIGNMENT == 0
    again = unpack(payload, [(tuple(t.shape), t.dtype) for t in tensors])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(again, tensors, strict=True))


def test_pack_takes_rows_that_are_not_contiguous():
    x = torch.arange(60.0).view(3, 4, 5).transpose(0, 2)
    assert torch.equal(unpack(pack([x]), [((5, 4, 3), torch.float32)])[0], x)


def test_a_payload_of_another_size_than_the_plan_says_is_refused():
    with pytest.raises(LinkError, match="has 16 bytes, the plan says 32"):
        unpack(pack([torch.ones(3)]), [((5,), torch.float32)])


def test_nothing_on_the_wire_is_pickled():
    """A message is a fixed header and raw bytes; the files that touch messages know no way to rebuild objects."""
    folder = Path(link_module.__file__).parent
    for name in ("link.py", "transport.py", "nixl_link.py", "server.py", "core_attention.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            names = [a.name for a in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            bad = {"pickle", "marshal", "dill", "cloudpickle", "load", "loads", "save", "eval", "exec"}
            assert not bad & {part for n in names if n != "json.loads" for part in n.split(".")} and not any(
                "_object" in n for n in names
            )


# ---- two processes ----


class Peer:
    """Another process; it opens links as told and answers every message with its own bytes."""

    def __init__(self, folder: Path, kind: str, number: int = 1):
        folder = folder / str(number)  # a store for each peer, as their links have the same names
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distca.parallel.transport", "psutil"])
        self._number, self._ours, self.kind = number, _transport(folder, kind, 0), kind
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_peer, args=(theirs, folder, kind, number), daemon=True)
        self.process.start()

    def ask(self, *command):
        self._pipe.send(command)
        assert self._pipe.poll(ANSWER_S), f"no answer to {command}"
        return self._pipe.recv()

    def open(self, name="link", end=TRAINER, deadline_s=None, peer_deadline_s=None) -> Link:
        """Our end of a new link; with `end` the role that we play."""
        self._pipe.send(("open", name, 1 - end, peer_deadline_s))
        ours = self._ours(deadline_s).open(self._number, name, end)
        assert self._pipe.poll(ANSWER_S) and self._pipe.recv() is None
        return ours

    def end(self):
        if self.process.is_alive():
            self.process.kill()  # works on a stopped process too
        self.process.join()


@contextmanager
def peers(folder: Path, number: int, kind: str):
    with ExitStack() as stack:
        made = [Peer(folder, kind, worker) for worker in range(1, number + 1)]
        for peer in made:
            stack.callback(peer.end)
        yield made


@pytest.fixture(scope="module", params=KINDS)
def peer(tmp_path_factory, request):
    with peers(tmp_path_factory.mktemp("link"), 1, request.param) as (made,):
        yield made


@pytest.fixture
def link(peer, request):
    return peer.open(request.node.name, deadline_s=ANSWER_S)


def _transport(folder: Path, kind: str, worker: int) -> Callable[[float | None], Transport]:
    """A worker's transport, made once for a folder and told the deadline of the next links."""

    @lru_cache(1)
    def made():
        store = dist.FileStore(str(folder / "store"), WORKERS)
        return make_transport(kind, store, worker, WORKERS, ADDRESS, ANSWER_S, torch.device("cpu"))

    def with_deadline(deadline_s):
        made()._deadline_s = deadline_s
        return made()

    return with_deadline


def _peer(pipe, folder: Path, kind: str, worker: int) -> None:
    torch.set_num_threads(1)
    links, transport = {}, _transport(folder, kind, worker)
    while True:
        command, *arguments = pipe.recv()
        answer = None
        if command == "open":
            name, end, deadline_s = arguments
            links[name] = transport(deadline_s).open(0, name, end)
            threading.Thread(target=_echo, args=(links[name],), daemon=True).start()
        elif command == "send later":
            name, seconds = arguments
            threading.Timer(seconds, links[name].send, [Header(PLAN, step=9)]).start()
        elif command == "send flipped":
            name, where = arguments
            with flipped(where):
                links[name].send(Header(REPLY), [torch.arange(1000.0)])
        elif command == "listening":
            found = psutil.Process().net_connections("inet")
            answer = [c.laddr.ip for c in found if c.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)]
        elif command == "memory":
            answer = psutil.Process().memory_info().rss
        elif command == "close":
            transport(None).close()
            answer = [t.name for t in threading.enumerate()]
        pipe.send(answer)


@contextmanager
def flipped(where: str):
    """One bit of what is sent meanwhile is flipped, after the checksums were made."""
    pack_header, take_checksum = Header.pack, link_module.checksum

    def flip_header(header):
        packed = pack_header(header)
        packed[{"header": 17, "magic": 0}[where]] ^= 1
        return packed

    def flip_payload(payload):
        check = take_checksum(payload)
        payload[1234] ^= 1
        return check

    with pytest.MonkeyPatch.context() as patch:
        if where == "payload":
            patch.setattr(link_module, "checksum", flip_payload)
        else:
            patch.setattr(Header, "pack", flip_header)
        yield


def _echo(link: Link) -> None:
    """Take messages on one thread and answer on another, as a server does."""
    taken = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(link, taken), daemon=True).start()
    try:
        while True:
            taken.put(link.wait_message())
    except LinkError:
        return


def _answer(link: Link, taken: queue.SimpleQueue) -> None:
    try:
        while True:
            header, payload = taken.get()
            payload = payload[-1600:] if header.kind == BACKWARD else payload
            link.send(replace(header, kind=REPLY), [payload] if payload.numel() else [])
    except LinkError:
        return


@pytest.mark.parametrize("size", [0, 1, 160, 20_000_000], ids="{} bytes".format)
def test_messages_of_any_size_come_back_as_they_left(link, size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    expected = data.clone()
    link.send(Header(FORWARD, step=1, call=size, scale=0.1), [data] if size else [])
    data.zero_()  # the sender may go on with its tensors
    header, payload = link.wait_message()
    assert (header.kind, header.step, header.call, header.scale) == (REPLY, 1, size, 0.1)
    assert torch.equal(payload[:size], expected) and payload.numel() == -(-size // 16) * 16
    assert not payload[size:].any()
    assert link.bytes_sent == link.bytes_received == 160 + payload.numel()


def test_many_messages_may_be_under_way(link):
    for number in range(200):
        link.send(Header(FORWARD, call=number), [torch.full((number,), float(number))])
    for number in range(200):
        header, payload = link.wait_message()
        (rows,) = unpack(payload, [((number,), torch.float32)])
        assert header.call == number and (rows == number).all()


def test_hundreds_of_messages_leave_no_memory_behind(peer, link):
    def exchange(count):
        for _ in range(count):
            link.send(Header(FORWARD), [torch.zeros(100_000)])
            link.wait_message()
        return psutil.Process().memory_info().rss, peer.ask("memory")

    before = exchange(40)
    after = exchange(300)
    assert all(b - a < 20_000_000 for a, b in zip(before, after, strict=True))  # 120 MB went each way


@pytest.mark.slow
@pytest.mark.alone
def test_a_payload_of_more_than_two_gib_arrives_whole(link):
    data = torch.zeros((1 << 31) + 1600, dtype=torch.uint8)
    data[-1600:] = torch.arange(1600).to(torch.uint8)
    expected = data[-1600:].clone()
    link.send(Header(BACKWARD), [data])
    del data
    header, payload = link.wait_message()
    assert header.kind == REPLY and torch.equal(payload, expected)


def test_an_answer_frees_the_buffers_of_its_question(link):
    """Eight messages of a long context would be gigabytes that nobody needs any more."""
    if isinstance(link, NixlLink):  # its slots stay, but one that is free is taken again
        for _ in range(5):
            link.send(Header(FORWARD), [torch.zeros(1000)])
            link.wait_message()
        assert [slot.memory is not None for slot in link.outgoing] == [True] + [False] * 7
        return
    for _ in range(5):
        link.send(Header(FORWARD), [torch.zeros(1000)])
        assert len(link._in_flight) == 1
        link.wait_message()
        assert len(link._in_flight) == 0


def test_threads_may_send_at_the_same_time_and_no_header_loses_its_payload(link):
    def send(number):
        for _ in range(20):
            link.send(Header(FORWARD, call=number), [torch.full((number * 1000,), float(number))])

    threads = [threading.Thread(target=send, args=(n,)) for n in range(1, 4)]
    [thread.start() for thread in threads]
    for _ in range(60):
        header, payload = link.wait_message()
        (rows,) = unpack(payload, [((header.call * 1000,), torch.float32)])
        assert (rows == header.call).all()
    [thread.join() for thread in threads]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [("payload", r"reply message .*\(checksum\)"), ("header", r"header .*\(checksum\)"), ("magic", "the same version")],
)
def test_one_flipped_bit_is_caught_and_the_link_named(peer, where, sentence):
    link = peer.open(f"flipped {where}", deadline_s=ANSWER_S)
    peer.ask("send flipped", f"flipped {where}", where)
    with pytest.raises(Damaged, match=f"link flipped {where}: .*{sentence}"):
        link.wait_message()


def test_nothing_listens_beyond_loopback(peer, link):
    assert set(peer.ask("listening")) == {ADDRESS}


def test_a_server_end_waits_without_limit(peer):
    link = peer.open("patient", end=SERVER, peer_deadline_s=ANSWER_S)
    peer.ask("send later", "patient", 1.5)
    header, payload = link.wait_message()
    assert (header.kind, header.step, payload.numel()) == (PLAN, 9, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [TRAINER, SERVER], ids=["seen by a trainer", "seen by a server"])
def test_a_killed_peer_ends_its_link_at_once_and_no_other(tmp_path, end, kind):
    with peers(tmp_path, 2, kind) as (dies, lives):
        lost, kept = dies.open(end=end, deadline_s=20 if end == TRAINER else None), lives.open(deadline_s=20)
        threading.Timer(0.3, os.kill, [dies.process.pid, signal.SIGKILL]).start()
        start = time.monotonic()
        with pytest.raises(LinkError, match="link link: no message"):
            lost.wait_message()
        assert time.monotonic() - start < 15
        with pytest.raises(LinkError, match="cannot send"):
            for _ in range(20):
                lost.send(Header(PLAN), [torch.zeros(1000)])
        assert echoed(kept)


@pytest.mark.parametrize("kind", ALONE)
def test_a_stopped_peer_is_given_up_after_the_deadline_and_no_other(tmp_path, kind):
    with peers(tmp_path, 2, kind) as (hangs, lives):
        lost, kept = hangs.open(deadline_s=1.0), lives.open(deadline_s=20)
        os.kill(hangs.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(LinkError, match="Timed out"):
            lost.send(Header(FORWARD), [torch.zeros(1000)])  # waits too where the receiver must make room first
            lost.wait_message()
        assert 0.9 < time.monotonic() - start < 60
        assert echoed(kept)


@pytest.mark.parametrize("kind", ALONE)
def test_sending_to_a_stopped_peer_ends_at_the_deadline_too(tmp_path, kind):
    with peers(tmp_path, 1, kind) as (hangs,):
        lost = hangs.open(deadline_s=1.0)
        os.kill(hangs.process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(LinkError, match="cannot send"):
            for _ in range(link_module.MAX_IN_FLIGHT + 1):
                lost.send(Header(FORWARD), [torch.zeros(100_000)])
        assert 0.9 < time.monotonic() - start < 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_pauses_within_the_deadline_is_waited_for(tmp_path, kind):
    with peers(tmp_path, 1, kind) as (slow,):
        link = slow.open(deadline_s=20)
        os.kill(slow.process.pid, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, [slow.process.pid, signal.SIGCONT]).start()
        start = time.monotonic()
        for call in range(3):
            link.send(Header(FORWARD, call=call), [torch.full((100_000,), float(call))])
        for call in range(3):
            header, payload = link.wait_message()
            assert header.call == call and (payload.view(torch.float32) == call).all()
        assert time.monotonic() - start > 1.4


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_transport_leaves_no_thread_of_its_own(tmp_path, kind):
    with peers(tmp_path, 1, kind) as (peer,):
        link = peer.open(deadline_s=20)
        assert echoed(link)
        assert not [name for name in peer.ask("close") if "nixl" in name.lower()]


def echoed(link: Link) -> bool:
    start = time.monotonic()
    link.send(Header(FORWARD, call=4), [torch.ones(10)])
    return link.wait_message()[0].call == 4 and time.monotonic() - start < 15


# ---- one process ----


def test_a_local_link_copies_rows():
    trainer, server = LocalLink.pair()
    rows = torch.ones(3)
    trainer.send(Header(FORWARD), [rows])
    rows.zero_()
    header, payload = server.wait_message()
    assert header.payload_bytes == payload.numel() == 16
    assert unpack(payload, [((3,), torch.float32)])[0].tolist() == [1, 1, 1]


def test_the_trainers_end_of_a_local_link_has_a_deadline():
    """A server in place waits for other trainers' rows; when one hangs, the trainer beside the server must notice."""
    trainer, server = LocalLink.pair(0.2)
    threading.Timer(0.4, trainer.send, [Header(PLAN)]).start()
    with pytest.raises(LinkError, match=r"within 0\.2 s"):
        trainer.wait_message()
    assert server.wait_message()[0].kind == PLAN
