"""What torch and bitsandbytes say of themselves: one JSON object a line, on stdout.

A process of its own, since a crash in native code ends it, and torch is not for everyone to load.
"""

import json
import warnings
from importlib.metadata import version


def main() -> None:
    warnings.simplefilter("ignore")
    import torch

    is_cuda = torch.cuda.is_available()
    _say(
        version=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        is_available=is_cuda,
        devices=torch.cuda.device_count() if is_cuda else 0,
        threads=torch.get_num_threads(),
    )
    from worker.model.bnb import functional

    device = "cuda" if is_cuda else "cpu"
    _say(version=version("bitsandbytes"), device=device, library=type(functional.lib).__name__)
    weights_OI = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    packed, state = functional.quantize_4bit(weights_OI, blocksize=64, quant_type="nf4", compress_statistics=True)
    restored_OI = functional.dequantize_4bit(packed, state)
    error = (weights_OI - restored_OI).float().abs().mean() / weights_OI.float().abs().mean()
    _say(error=error.item())


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
