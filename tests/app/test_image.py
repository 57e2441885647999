"""What the API's image does not hold, the API does not miss."""

import subprocess
import sys

ABSENT = ("torch", "transformers", "huggingface_hub", "peft", "bitsandbytes", "celery", "kombu", "redis", "gguf", "worker")


def test_the_api_starts_without_torch_and_celery() -> None:
    block = ";".join(f"sys.modules[{name!r}] = None" for name in ABSENT)
    program = f"import sys; {block}; from app.main import create_app; print(create_app().title)"
    secrets = {"TUNESMITH_KEY_PEPPER": "a", "TUNESMITH_ENGINE_TOKEN": "b"}
    done = subprocess.run([sys.executable, "-c", program], env=secrets, capture_output=True, text=True, check=False)

    assert done.stdout == "Tunesmith\n", done.stderr
