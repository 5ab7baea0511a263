"""Write tests/golden/tokenizer.json: token ids and decoded texts of transformers 5.23.0.

    PYTHONPATH=. python tests/make_golden_tokenizer.py

Needed only when the cases in texts.py change. It requires requirements-dev.txt and no network.
"""

import json
import tempfile
from pathlib import Path

from real_vocabulary import build_tokenizer
from texts import IDS, TEXTS
from transformers import Qwen2Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tokenizer.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        reference = Qwen2Tokenizer.from_pretrained(build_tokenizer(directory))
    encoded = {name: reference(text)["input_ids"] for name, text in TEXTS.items()}
    decoded = {
        name: [reference.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
        for name, ids in (encoded | IDS).items()
    }
    lines = [f'"ids": {json.dumps(encoded)}', f'"text": {json.dumps(decoded)}']
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(
        f"{GOLDEN}: {len(encoded)} texts, {len(decoded)} id sequences, "
        f"{GOLDEN.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
