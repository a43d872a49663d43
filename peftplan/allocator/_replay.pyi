EVENTS: int
GROWS: int

def replay(
    events: bytes, sizes: bytes, storages: int, handles: int, phases: int, downwards: bool, capacity: int, grows: bool = False, /
) -> tuple[int, ...]: ...
