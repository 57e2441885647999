"""Memory that forwards keep: never shared while it is held, always used again."""

import gc

import torch

from worker.training.workspace import Kept, Workspace

CPU = torch.device("cpu")


def storage_of(kept: Kept, *, dtype: torch.dtype = torch.float32) -> int:
    return kept.empty((8,), dtype).untyped_storage().data_ptr()


def test_pieces_do_not_overlap() -> None:
    kept = Workspace().open(CPU)
    pieces = [kept.empty((size, 7), dtype) for size in (3, 1000, 17) for dtype in (torch.bfloat16, torch.float32)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)

    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces))
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)


def test_what_is_let_go_of_is_used_again_and_what_is_held_is_not() -> None:
    workspace = Workspace()
    held = workspace.open(CPU)
    first = storage_of(held)
    other = workspace.open(CPU)

    assert storage_of(other) != first
    del held
    gc.collect()
    assert storage_of(workspace.open(CPU)) == first


def test_a_piece_larger_than_a_block_gets_one_of_its_own() -> None:
    assert Workspace().open(CPU).empty((20_000_000,), torch.float32).shape == (20_000_000,)
