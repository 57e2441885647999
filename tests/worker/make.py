"""A machine's NVML, as the module `pynvml` shows it: a stand-in for the driver, which tests cannot have."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    total: int


@dataclass(frozen=True)
class Board:
    """One GPU, or a MIG instance."""

    name: str = "NVIDIA GeForce RTX 4090"
    uuid: str = "GPU-aaaa-0001"
    mib: int = 24_564
    is_split: bool = False


class NVMLError(Exception):
    pass


class Machine:
    """Has these boards in the order of the PCI bus, and these MIG instances."""

    NVMLError = NVMLError

    def __init__(self, *boards: Board, instances: tuple[Board, ...] = (), has_driver: bool = True) -> None:
        self._boards, self._instances, self._has_driver = boards, instances, has_driver

    def nvmlInit(self) -> None:
        if not self._has_driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Board:
        return self._boards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Board:
        for board in (*self._boards, *self._instances):
            if board.uuid == uuid:
                return board
        raise NVMLError("Not Found")

    def nvmlDeviceGetName(self, handle: Board) -> str:
        return handle.name

    def nvmlDeviceGetUUID(self, handle: Board) -> str:
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: Board) -> Memory:
        return Memory(handle.mib * MIB)

    def nvmlDeviceGetMigMode(self, handle: Board) -> tuple[int, int]:
        if "4090" in handle.name:
            raise NVMLError("Not Supported")
        return (int(handle.is_split), int(handle.is_split))
