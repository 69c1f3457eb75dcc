"""DistributedDataParallel over fused blocks in two processes with gloo, which are started once for all checks."""

from __future__ import annotations

from pathlib import Path

import distributed_worker
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_two_processes(tmp_path: Path) -> None:
    """Two forwards before a backward, averaged gradients, uneven batches and SyncBatchNorm work like stock blocks."""
    assert len(distributed_worker.CHECKS) == 12
    mp.spawn(distributed_worker.main, args=(2, str(tmp_path)), nprocs=2)
