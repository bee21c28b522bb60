"""What processes forked in these tests would otherwise import one by one; their server serves `tests.ranks` too."""

import multiprocessing

from launch.commands.verify import PRELOADED
from tests import ranks  # sets its own list when it is imported: before this one, not after

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [*PRELOADED, "torch.distributed.checkpoint", "torch.distributed.tensor.parallel", ranks.__name__]
)
