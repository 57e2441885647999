from app.core.checkpoints import best, kept

UNJUDGED = {"train_loss": 1.0}


def losses(**of_steps: float) -> dict[int, dict[str, float]]:
    return {int(step.removeprefix("s")): {"valid_loss": loss} for step, loss in of_steps.items()}


def test_the_newest_the_one_before_and_the_best_are_kept() -> None:
    assert kept(losses(s2=3.0, s4=1.0, s6=2.0, s8=2.5, s10=2.6), newest=10) == {4, 8, 10}
    assert kept(losses(s2=3.0, s4=2.0, s6=1.0), newest=6) == {4, 6}


def test_of_equally_good_ones_the_first_is_the_best() -> None:
    """A run that is stopped keeps a checkpoint with the validation loss of an earlier one."""
    assert kept(losses(s2=1.0, s4=1.0, s5=1.0, s6=1.0), newest=6) == {2, 5, 6}


def test_without_validation_there_is_no_best() -> None:
    assert kept({2: UNJUDGED, 4: UNJUDGED, 6: UNJUDGED}, newest=6) == {4, 6}
    assert kept({2: UNJUDGED}, newest=2) == {2}


def test_what_was_not_gone_on_from_takes_nobody_s_place() -> None:
    """The checkpoint of step 8 was damaged, and the run went on from step 4."""
    assert kept({2: UNJUDGED, 4: UNJUDGED, 8: UNJUDGED} | losses(s6=1.0, s10=0.5), newest=6) == {4, 6}


def test_the_best_is_the_first_of_the_lowest_that_were_gone_on_from() -> None:
    found = losses(s2=3.0, s4=1.0, s5=1.0, s6=2.0, s8=0.5)

    assert (best(found, newest=8), best(found, newest=6)) == (8, 4)
    assert best({2: UNJUDGED}, newest=2) is None
