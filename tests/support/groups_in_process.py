"""Process groups of two whose ends are threads of one process: what a link sends goes through its store.

`InProcess` takes tensors of one kind of device, as Gloo (CPU) and NCCL (fake CUDA) do. As NCCL it has a stream of its
own, which its sends and receives order like NCCL's do, and keeps buffers until somebody has waited; then a received one
holds its message."""

import torch
from fake_cuda import CudaTensor, DeviceError, Stream, current_gpu


class InProcess:
    def __init__(self, store, end: int, device_type: str):
        self._store, self._end, self._device_type = store, end, device_type
        self._sent = self._received = 0
        self._stream = Stream() if device_type == "cuda" else None

    def send(self, tensors: list[torch.Tensor], peer: int, _tag: int) -> "Work":
        (x,) = tensors
        event = self._launch(x, reads=True)
        self._sent += 1
        self._store.set(f"from {self._end}, {self._sent}", (x.host if event else x).numpy().tobytes())
        return Work(event, x)

    def recv(self, tensors: list[torch.Tensor], peer: int, _tag: int) -> "Work":
        (x,) = tensors
        event = self._launch(x, reads=False)
        self._received += 1
        return Work(event, x, lambda: self._store.get(f"from {peer}, {self._received}"))

    def _launch(self, x: torch.Tensor, reads: bool):
        if x.device.type != self._device_type or not x.is_contiguous():
            raise DeviceError(f"a group for {self._device_type} is given a tensor of {x.device}")
        if self._stream is None:
            return None
        gpu = current_gpu()
        self._stream.wait_stream(gpu.current())
        with gpu.stream(self._stream):
            gpu.launch("NCCL", [x.host] if reads else [], [] if reads else [x.host])
        return self._stream.record_event()


class Work:
    """`wait` makes the current stream wait for NCCL's; for Gloo's, the host."""

    def __init__(self, event, x: torch.Tensor, arrive=None):
        self._event, self._x, self._arrive = event, x, arrive
        current_gpu().kept.add(self)

    def wait(self, _timeout=None) -> None:
        if self._arrive:
            host = self._x.host if isinstance(self._x, CudaTensor) else self._x
            host.copy_(torch.frombuffer(bytearray(self._arrive()), dtype=torch.uint8))
        if self._event:
            current_gpu().current().wait_event(self._event)
        self._x = self._arrive = None
        current_gpu().kept.discard(self)
