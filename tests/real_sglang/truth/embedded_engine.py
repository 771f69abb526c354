"""A program that embeds SGLang's engine, as RL trainers do, and does as it is told.

The first line on stdin holds the engine's settings, each further one an order; every one is
answered with a line of JSON on stdout.  Runs in a hooked interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT = [75, 104, 111, 111, 114]


def weights_checker(engine: Any) -> Any:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    request = CheckWeightsReqInput(action="checksum")
    success, message, ranks, _ = engine.loop.run_until_complete(
        engine.tokenizer_manager.check_weights(request, None)
    )
    return {"success": success, "message": message, "ranks": ranks}


def buckets(engine: Any, checkpoint: str, flattened: bool) -> Any:
    """A session of three buckets; flattened ones are made as SGLang's own trainers make them."""
    from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]
    from sglang.srt.utils import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        MultiprocessingSerializer,
    )
    from sglang.srt.weight_sync.tensor_bucket import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        FlattenedTensorBucket,
    )

    files = sorted(Path(checkpoint).glob("*.safetensors"))
    named = [pair for file in files for pair in load_file(file).items()]
    answers = [engine.begin_weight_update()]
    size = -(-len(named) // 3)
    for start in range(0, len(named), size):
        content: Any = named[start : start + size]
        options: dict[str, Any] = {"flush_cache": start + size >= len(named)}
        if flattened:
            bucket = FlattenedTensorBucket(named_tensors=content)
            flat = {
                "flattened_tensor": bucket.get_flattened_tensor(),
                "metadata": bucket.get_metadata(),
            }
            content = [MultiprocessingSerializer.serialize(flat)]
            options["load_format"] = "flattened_bucket"
        answers.append(engine.update_weights_from_tensor(content, **options))
    answers.append(engine.end_weight_update())
    return [_as_dict(answer) for answer in answers]


def _as_dict(answer: Any) -> dict[str, Any]:
    """(success, message), or a structure that says both."""
    if isinstance(answer, (tuple, list)):
        return {"success": bool(answer[0]), "message": str(answer[1])}
    return {"success": bool(getattr(answer, "success", answer)), "message": repr(answer)}


def obey(engine: Any, order: dict[str, Any]) -> Any:
    what = order.pop("do")
    if what == "generate":
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answer = engine.generate(input_ids=PROMPT, sampling_params=sampling)
        return answer.get("output_ids") or answer["text"]
    if what == "weights_checker":
        return weights_checker(engine)
    if what == "get_weights_by_name":
        return engine.get_weights_by_name(**order)
    if what == "disk":
        return _as_dict(engine.update_weights_from_disk(order["checkpoint"]))
    return buckets(engine, **order)


def main() -> None:
    # The answers' way out is kept; whatever prints on stdout prints on stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())

    import sglang  # type: ignore[import-not-found, import-untyped, unused-ignore]

    engine = sglang.Engine(**settings)
    try:
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(obey(engine, json.loads(line))), file=answers, flush=True)
    finally:
        engine.shutdown()


# SGLang spawns its schedulers, and each of them imports this file anew.
if __name__ == "__main__":
    main()
