EVENTS: int
GROWS: int
MOST_ALIKE: int

def replay(
    events: bytes, sizes: bytes, storages: int, handles: int, phases: int, downwards: bool, capacity: int, grows: bool = False, /
) -> tuple[int, ...]: ...
def replay_alike(
    events: list[bytes],
    sizes: list[bytes],
    prefix: int,
    suffix: int,
    same_sizes: int,
    storages: int,
    handles: int,
    phases: int,
    downwards: bool,
    grows: bool,
    /,
) -> list[tuple[int, ...]] | None: ...
