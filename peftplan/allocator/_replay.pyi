EVENTS: int
GROWS: int
MOST_ALIKE: int
STREAMS: int

def replay(
    events: bytes, sizes: bytes, storages: int, handles: int, phases: int, downwards: bool, capacity: int, grows: bool = False, /
) -> tuple[int, ...]: ...
def replay_several(
    programs: list[tuple[bytes, bytes, int, int, int]], few: int, downwards: bool, grows: bool, /
) -> list[tuple[int, ...]] | None: ...
def levels(structure: bytes, sizes: bytes, products: bytes, standing: int, /) -> tuple[bytes, list[tuple[int, int]]] | None: ...
