import pickle
import time

from app.core import ids
from app.core.errors import BadRequest


def test_ids_sort_by_time() -> None:
    first = ids.new("file-")
    time.sleep(0.002)
    second = ids.new("file-")

    assert first < second
    assert len(first) == len("file-") + 26


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadRequest("no", param="model", code="odd")))

    assert (str(error), error.param, error.code) == ("no", "model", "odd")
