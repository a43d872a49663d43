"""PyTorch's CUDA caching allocator, modelled: replay an event log and read allocated, requested and reserved bytes.

Pure Python without torch. It follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13 function by function.
"""

from peftplan.trace.allocator.config import AllocatorConfig, from_environ, parse_config
from peftplan.trace.allocator.core import Allocator
from peftplan.trace.allocator.device import SegmentEvent
from peftplan.trace.allocator.events import Event
from peftplan.trace.allocator.oom import OutOfMemory
from peftplan.trace.allocator.replay import Replay, Timeline, replay
from peftplan.trace.allocator.snapshots import Comparison, RecordedTrace, compare, load_snapshot, read_trace
from peftplan.trace.allocator.stats import Peaks

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
