"""PyTorch's CUDA caching allocator, modelled: replay an event log and read allocated, requested and reserved bytes.

Pure Python without torch. It follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13 function by function.
"""

from peftplan.memory.allocator.config import AllocatorConfig, from_environ, parse_config
from peftplan.memory.allocator.core import Allocator
from peftplan.memory.allocator.device import SegmentEvent
from peftplan.memory.allocator.events import Event
from peftplan.memory.allocator.oom import OutOfMemory
from peftplan.memory.allocator.replay import Replay, Timeline, replay
from peftplan.memory.allocator.snapshots import Comparison, RecordedTrace, compare, load_snapshot, read_trace
from peftplan.memory.allocator.stats import Peaks

__all__ = [
    "Allocator",
    "AllocatorConfig",
    "Comparison",
    "Event",
    "OutOfMemory",
    "Peaks",
    "RecordedTrace",
    "Replay",
    "SegmentEvent",
    "Timeline",
    "compare",
    "from_environ",
    "load_snapshot",
    "parse_config",
    "read_trace",
    "replay",
]
