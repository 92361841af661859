"""A client asks a real cluster for its prompt's hidden states, and finds the file that the answer names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from support.served import Served, wait_for


def test_the_named_file_holds_the_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    served = Served(tmp_path, "--set", f"hidden_states={{folder: {folder}, layers: [0, 2]}}")
    try:
        served.wait_ready()
        whole = served.complete(prompt=[5, 6, 7, 8], max_tokens=4, n=2, return_hidden_states=True)["choices"]
        assert whole[0]["hidden_states"] == whole[1]["hidden_states"]
        body = {"prompt": [[5, 6, 7, 8], [9] * 700], "max_tokens": 4, "stream": True, "return_hidden_states": True}
        names = {}
        with served.client.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                    if "hidden_states" in choice:
                        names[choice["index"]] = choice["hidden_states"]
        files = [folder / name for name in (whole[0]["hidden_states"], names[0], names[1])]
        wait_for(lambda: all(file.is_file() for file in files), 30, "the files")
        found = [load_file(file) for file in files]
        assert found[2]["token_ids"].tolist() == [9] * 700
        np.testing.assert_allclose(found[0]["hidden_states"], found[1]["hidden_states"], atol=1e-4)
        assert found[0]["hidden_states"].shape[:2] == (4, 2)
        # The client cannot choose where.
        for bad in ("../x", {"path": "/tmp/x"}):
            answer = served.client.post("/v1/completions", json={"prompt": [5], "return_hidden_states": bad})
            assert answer.status_code == 400
        assert served.stop() == 0
    finally:
        served.kill()
