"""Measured kernel times for tests: a made-up device, slow at starting and slower backward."""

from pathlib import Path

import yaml


def write_hardware(path: Path, **changes) -> Path:
    rows, keys = [16, 128, 4096], [16, 128, 1024, 16384]
    forward = [[1e-6 + r * (k + 50) * 1e-9 for k in keys] for r in rows]
    values = dict(
        device="none",
        versions={"torch": "2.13.0"},
        date="2026-11-22",
        command="made up for tests",
        backend="torch",
        query_heads=8,
        kv_heads=2,
        head_dim=8,
        dtype="fp32",
        rows=rows,
        keys=keys,
        forward_s=forward,
        backward_s=[[3 * s + r * 1e-7 for s in row] for r, row in zip(rows, forward, strict=True)],
    )
    path.write_text(yaml.safe_dump(values | changes))
    return path
