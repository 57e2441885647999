"""One process that speaks with Weights & Biases: words in on stdin, a line of JSON out, and it is over."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import wandb
from wandb.errors import AuthenticationError, CommError, UsageError

INIT_SECONDS, FINISH_SECONDS = 20, 25


def tell(words: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Log the points that the server has not got. Raises what the library raises."""
    ending = words["ending"]
    settings = wandb.Settings(
        mode="online",  # whatever a settings file of this machine says
        base_url=words["base_url"],
        root_dir=directory,
        silent=True,
        console="off",  # of what is printed or measured here nothing is the customer's
        host="tunesmith",
        program="tunesmith",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        x_graphql_retry_max=1,  # whoever started this tries again, and waits longer in between
        x_graphql_retry_wait_min_seconds=1,
        x_graphql_retry_wait_max_seconds=1,
        x_file_stream_retry_max=2,
        x_update_finish_state=ending is not None,  # until then the run goes on
    )
    run = wandb.init(**words["run"], resume="allow", settings=settings)
    for point in words["points"]:
        if point["step"] >= run.starting_step:  # the first that the server has not got
            run.log({**point["metrics"], "_timestamp": point["at"]}, step=point["step"])
    if ending:
        run.summary.update({**ending["summary"], **({"error": ending["error"]} if ending["error"] else {})})
    run.finish(exit_code=0 if ending is None or ending["state"] == "succeeded" else 1)
    return {"run_id": run.id, "url": run.url}


def _told(words: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tunesmith-wandb-") as directory:
        try:
            return tell(words, directory)
        except AuthenticationError as error:
            return {"reason": "it refuses the key of this installation", "detail": str(error)}
        except UsageError as error:
            return {"reason": "it refuses the run as it was asked for", "detail": str(error)}
        except (CommError, TimeoutError) as error:
            return {"reason": "it does not answer", "detail": str(error)}
        except Exception as error:  # the library has more of its own, one for a service of its that has crashed
            return {"reason": "its library has failed", "detail": f"{type(error).__name__}: {error}"}


def main() -> None:
    signal.alarm(int(os.environ["TUNESMITH_SECONDS"]))  # also when nobody waits any more: the cursor may be claimed anew
    print(json.dumps(_told(json.load(sys.stdin))), flush=True)


if __name__ == "__main__":
    main()
