"""A server with the part of vLLM's API that preftune uses: a real sampler, that fails in every way on demand.

It loads what is handed over with transformers, and answers with what that model draws, by its own log-probs.
`faults` (see `llm_server`) are those of the next requests to `faulty`; `spoil` changes a finished answer.
Forms are those of vLLM 0.32: vllm/entrypoints/openai/completion/protocol.py, serve/dev/rpc/api_router.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_server import Fault, Model

COMPLETIONS = "/v1/completions"


@dataclass
class VLLMServer(Model):
    name: str = "policy"
    faulty: str = COMPLETIONS
    spoil: Callable[[dict[str, Any]], object] = lambda answer: None
    holds: PreTrainedModel | None = None
    reloads: bool = True  # False: it says that it has loaded what it was given, and has not
    loaded: list[Path] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next_fault(self, path: str) -> Fault:
        return self.faults.pop(0) if self.faults and path == self.faulty else None

    def answer(self, path: str, body: dict[str, Any]) -> bytes:
        with self.lock:  # one engine
            match path:
                case "/health":
                    return b""
                case "/v1/models":
                    return json.dumps({"data": [{"id": self.name, "parent": None}]}).encode()
                case "/collective_rpc":
                    self._reload(body)
                    return b'{"results": [null]}'
                case "/v1/completions":
                    answer = self._complete(body)
                    self.spoil(answer)
                    return json.dumps(answer).encode()
        return b""

    def _reload(self, body: dict[str, Any]) -> None:
        assert body["method"] == "reload_weights"
        path = Path(body["kwargs"]["weights_path"])
        self.loaded.append(path)
        if self.holds is not None and not self.reloads:
            return
        packed = self.holds.get_output_embeddings().weight if self.holds is not None else None
        self.holds = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with safe_open(path / "model.safetensors", "pt") as file:
            named = "lm_head.weight" in file.keys()  # noqa: SIM118
        if packed is not None and not named:  # as vLLM's build for CPUs: it goes on with its packed copy
            self.holds.get_output_embeddings().weight = packed

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.holds is not None
        assert (body["top_p"], body["top_k"], body["ignore_eos"]) == (1.0, -1, True)
        choices = []
        for which in range(body["n"]):
            random = torch.Generator().manual_seed(body["seed"] + which)
            ids, drawn, logprobs = list(body["prompt"]), list[int](), list[float]()
            while len(drawn) < body["max_tokens"] and not {*drawn} & {*body["stop_token_ids"]}:
                logits = self.holds(torch.tensor([ids])).logits[0, -1] / body["temperature"]
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=random))
                drawn.append(token)
                ids.append(token)
                logprobs.append(logits.log_softmax(-1)[token].item())
            tokens = [f"token_id:{i}" for i in drawn]
            said = {"token_logprobs": logprobs, "tokens": tokens, "top_logprobs": None}
            choices.append({"index": which, "text": "", "logprobs": said, "token_ids": drawn})
        return {"object": "text_completion", "model": self.name, "choices": choices}
