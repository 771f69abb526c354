"""A fake ``sglang`` with real files under the real names, and code that hooks it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

RunPython = Callable[..., subprocess.CompletedProcess[str]]
RUNNER = "sglang.srt.model_executor.model_runner"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater"
MODEL_RUNNER = """
class ModelRunner:
    def load_model(self):
        return "loaded"
    def finalize_startup_weight_load(self):
        return "final"
    def alloc_memory_pool(self):
        pass
    def load_lora_adapter(self, lora_ref):
        pass
    def load_lora_adapter_from_tensors(self, lora_ref, tensors, config_dict):
        pass
    def unload_lora_adapter(self, lora_ref):
        pass

if __name__ == "__main__":
    import inspect, sys
    print("main", __spec__.name, __file__ == inspect.getsourcefile(ModelRunner), sys.argv[1:])
"""
WEIGHT_UPDATER = """
from dataclasses import dataclass

@dataclass(frozen=True)
class WeightUpdater:
    runner: object = None
    def get_model_runner(self): return self.runner
    def update_weights_from_disk(self, model_path, load_format): return True, "ok"
    def update_weights_from_tensor(self, named_tensors): return True, "ok"
    def update_weights_from_ipc(self, recv_req): return True, "ok"
    def load_weights_from_distributed(self, named_tensors): return True, "ok"
    def begin_weight_update(self): pass
    def end_weight_update(self, *, run_post_load): pass
"""
INSTALL = "import sglang_patch_loader; sglang_patch_loader.install()\n"
PATCHED = "hasattr(ModelRunner.load_model, '_sglang_weight_hook_entry')"
ONCE = f"""
from {RUNNER} import ModelRunner
print({PATCHED}, hasattr(ModelRunner.load_model.__wrapped__, "__wrapped__"),
      type(sys.modules[{RUNNER!r}].__spec__.loader).__name__, sglang_patch_loader._walking)
"""
