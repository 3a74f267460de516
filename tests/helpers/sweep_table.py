"""The table of docs/models.md: all causal LM classes and all image-text classes, swept.

python -m tests.helpers.sweep_table --write docs/models.md     # all, about four minutes on one core
python -m tests.helpers.sweep_table LlamaForCausalLM           # a few, printed
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from chunkdist.models import exact_classes
from tests.helpers.image_sweep import run_image_class
from tests.helpers.image_zoo import image_class_names
from tests.helpers.model_zoo import WINDOW, class_names
from tests.helpers.sweep import CHUNK_SIZE, NUM_TOKENS, TOLERANCE, Record, run_class

MODELS_MD = Path(__file__).parents[2] / "docs" / "models.md"
EXACT_CLASSES = Path(exact_classes.__file__)
_IMAGES = "## With images"


def table(records: Iterable[Record], image_records: Iterable[Record]) -> str:
    """docs/models.md."""
    torch_version = torch.__version__.partition("+")[0]
    records, image_records = list(records), list(image_records)
    return f"""# Models

Every causal LM class of transformers {transformers.__version__}, swept with torch {torch_version}:
{_summary(records)}. Image-text classes are [below](#with-images).

A tiny random model of each class runs in chunks of {CHUNK_SIZE} of {NUM_TOKENS} tokens, in groups of one
layer and of all, on right-padded rows and on a packed stream, and its loss and all its parameter gradients
are compared with those of the unchunked model, in fp64. Sliding windows are {WINDOW} tokens, dropout is off.

- **exact**: they agree to {TOLERANCE:.0e}. What is refused nevertheless is said beside it. Of classes with
  images, sounds or other towers, this table says what happens to rows of text.
- **refused**: `chunk_model`, or the first step, raises `UnsupportedModelError` with this reason.

Written by `python -m tests.helpers.sweep_table --write docs/models.md`; `tests/models/test_sweep.py` fails
when it is out of date.

{_rows(records)}
{_IMAGES}

Every image-text class: {_summary(image_records)}.

Two right-padded rows with an image in each run in chunks of {CHUNK_SIZE} tokens, in groups of one layer and
of all; the chunks cut through the images. The loss, and the gradients of all parameters of the decoder, the
tower and what is between them, are compared as above.

- **exact**: they agree to {TOLERANCE:.0e}, with images.
- **refused**: `chunk_model`, or the first step with an image, raises `UnsupportedModelError` for this reason.
- **not built**: the sweep has no tiny model of the class, or does not know how it takes its images. The
  layers of its decoder are asked in the first step, as those of any class that is not known.

{_rows(image_records)}"""


def _summary(records: Iterable[Record]) -> str:
    counts = Counter(record.outcome for record in records)
    return ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in ("exact", "refused", "not built") if counts[outcome]
    )


def _rows(records: Iterable[Record]) -> str:
    records = sorted(records, key=lambda record: record.name.lower())
    rows = "".join(f"| {record.name} | {record.outcome} | {record.reason} |\n" for record in records)
    return f"| class | outcome | reason |\n|---|---|---|\n{rows}"


def exact_classes_module(records: Iterable[Record], image_records: Iterable[Record]) -> str:
    """chunkdist/models/exact_classes.py."""
    docstring = (EXACT_CLASSES.read_text()).partition("\n")[0]
    sets = _set("CLASSES", records), _set("IMAGE_CLASSES", image_records)
    return f'{docstring}\n\nTRANSFORMERS_VERSION = "{transformers.__version__}"\n\n{"".join(sets)}'


def _set(name: str, records: Iterable[Record]) -> str:
    names = sorted(record.name for record in records if record.outcome == "exact")
    lines = "".join(f'        "{name}",\n' for name in names)
    return f"{name} = frozenset(\n    (\n{lines}    )\n)\n"


def read_table(path: Path = MODELS_MD) -> tuple[str, dict[str, Record], dict[str, Record]]:
    """The version of transformers that was swept, and the records by class: of text, and with images."""
    text = path.read_text()
    version = re.search(r"transformers ([\w.]+),", text)
    assert version is not None, f"{path} names no version of transformers"
    of_text, _, of_images = text.partition(_IMAGES)
    return version[1], _records(of_text), _records(of_images)


def _records(text: str) -> dict[str, Record]:
    rows = [
        line.strip("| \n").split("|", 2)
        for line in text.splitlines()
        if re.match(r"\| \w+ \| (exact|ref|not)", line)
    ]
    cells = ([cell.strip() for cell in (*row, "")[:3]] for row in rows)
    return {name: Record(name=name, outcome=outcome, reason=reason) for name, outcome, reason in cells}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="classes; default: all")
    parser.add_argument(
        "--write", type=Path, help=f"write the table of all classes to this file, and {EXACT_CLASSES.name}"
    )
    options = parser.parse_args()
    if options.write and options.names:
        parser.error("--write takes all classes: leave the names out")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found: list[list[Record]] = []
    for run, names in ((run_class, class_names()), (run_image_class, image_class_names())):
        found.append([])
        for name in names:
            if options.names and name not in options.names:
                continue
            found[-1].append(run(name))
            print(f"{found[-1][-1].outcome:9} {name} {found[-1][-1].reason}", flush=True)
    records, image_records = found
    both = [*records, *image_records]
    print(dict(Counter(record.outcome for record in both)))
    if any(record.outcome in ("wrong", "crashed") for record in both):
        raise SystemExit("some classes are neither exact nor refused")
    if options.write:
        options.write.write_text(table(records, image_records))
        EXACT_CLASSES.write_text(exact_classes_module(records, image_records))


if __name__ == "__main__":
    main()
