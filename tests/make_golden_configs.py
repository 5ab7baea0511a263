"""Write tests/golden/configs.json: what versions of transformers save as config.json.

    python tests/make_golden_configs.py

It builds a temporary virtual environment per version, which takes the package index and a few
minutes.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VERSIONS = ("4.45.2", "4.57.6", "5.23.0")

ARGUMENTS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "bos_token_id": 280,
    "eos_token_id": 281,
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_config": {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": 64,
        "mlp_ratio": 2,
    },
}

WRITE = """
import json, sys
from transformers import Qwen2VLConfig
arguments = json.loads(sys.argv[1])
saved = {}
for name, tied in (("tied", True), ("untied", False)):
    config = Qwen2VLConfig(**arguments, tie_word_embeddings=tied)
    config.save_pretrained(sys.argv[2])
    saved[name] = json.load(open(sys.argv[2] + "/config.json"))
print(json.dumps(saved))
"""


def main() -> None:
    golden = {}
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as directory:
            venv.create(directory, with_pip=True)
            python = Path(directory) / "bin" / "python"
            subprocess.run(
                [python, "-m", "pip", "install", "-q", f"transformers=={version}"], check=True
            )
            completed = subprocess.run(
                [python, "-c", WRITE, json.dumps(ARGUMENTS), directory],
                check=True,
                capture_output=True,
                text=True,
            )
        golden[version] = json.loads(completed.stdout.splitlines()[-1])
        print(f"transformers {version}: done", file=sys.stderr)
    path = Path(__file__).parent / "golden" / "configs.json"
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
