EVENTS: int

def replay(
    events: bytes, sizes: bytes, storages: int, handles: int, phases: int, downwards: bool, capacity: int, /
) -> tuple[int, ...]: ...
