"""Fills, just in time, what SGLang's imports expect of a machine with CUDA.

Python runs this file at start-up because its folder is on ``PYTHONPATH``.  It
imports nothing itself: a finder that finds nothing looks at what is about to be
imported, so an interpreter that never imports torch pays nothing.
"""

# mypy: ignore-errors
# (it reaches into private parts of torch and SGLang, which may or may not be installed)

import sys


def _declare_vision_operators() -> None:
    # torchvision comes built for CUDA; with a CPU torch its compiled half does not
    # load (it accepts that silently), and then its Python half describes operators
    # that nobody defined and fails.  At this point the compiled half has been tried,
    # so asking whether the operators exist gives the final answer.
    import torch

    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    missing = [name for name in ("nms", "qnms") if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + signature)
        _keep_alive.append(library)  # a library takes its definitions with it


def _accept_renamed_option(new_process_group):
    def with_todays_name(*args, **kwargs):
        if "pg_options" in kwargs:
            kwargs["backend_options"] = kwargs.pop("pg_options")
        return new_process_group(*args, **kwargs)

    return with_todays_name


def _prepare_for_sglang() -> None:
    import torch
    from torch.distributed import distributed_c10d

    # Up to 0.5.5 at least, SGLang picks this option's name by comparing versions as
    # text, and "2.13" sorts before "2.6".
    distributed_c10d._new_process_group_helper = _accept_renamed_option(
        distributed_c10d._new_process_group_helper
    )
    # Asked by SGLang 0.4.9 to 0.5.1; the torch of today no longer has the question.
    if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):
        torch._C._cpu._is_amx_tile_supported = lambda: False
    try:
        # Its folder is on the path only for the releases that need it.
        import sglang_0_4_gaps  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sglang_0_4_gaps":
            raise


_keep_alive: list[object] = []
_before_import = {
    "torchvision._meta_registrations": _declare_vision_operators,
    "sglang": _prepare_for_sglang,
}


class _JustInTime:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        prepare = _before_import.pop(name, None)
        if prepare is not None:
            prepare()


sys.meta_path.insert(0, _JustInTime)
