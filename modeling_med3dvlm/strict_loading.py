"""Loading that fails where weights would stay random, instead of reporting it in passing."""

from typing import Any

from safetensors import SafetensorError


class StrictLoadingMixin:
    """
    Makes `from_pretrained` raise when a checkpoint and the model do not hold the same tensors. transformers initialises
    what is missing, drops what is left over and logs a table; a medical model that answers with a random part must not
    come out of that. Stands before `PreTrainedModel` among the base classes.
    """

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """
        Called by `PreTrainedModel.from_pretrained`. Where an adapter is loaded afterwards, transformers returns the report on
        that alone: the one on the model itself is kept here.
        """
        report = super()._finalize_model_loading(model, load_config, loading_info)
        model._own_report = (load_config.pretrained_model_name_or_path, len(model.state_dict()), report.to_dict())
        return report

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        strict: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ):
        r"""
        As `PreTrainedModel.from_pretrained`, and:

        Args:
            strict (`bool`, *optional*, defaults to `True`):
                Whether to raise when tensors are missing, left over or of another shape. `False` loads what fits, for
                instance to start another architecture from a checkpoint; `ignore_mismatched_sizes=True` forgives
                other shapes only.

        Raises:
            OSError: the weights are truncated or damaged.
            ValueError: the checkpoint does not fit; the message lists the tensors. Also, whatever `strict` is, when
                nothing of it fits. An adapter's base model is checked like any other, and the adapter too.
        """
        is_shape_forgiven = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                # Left to itself, a tensor of another shape raises before the other faults are known.
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise OSError(
                f"{pretrained_model_name_or_path}: its weights are truncated or damaged ({error}). Copy or download them "
                "again."
            ) from error
        reports = [model.__dict__.pop("_own_report")] if "_own_report" in model.__dict__ else []
        if getattr(model, "_hf_peft_config_loaded", False) or not reports:
            reports.append((pretrained_model_name_or_path, len(model.state_dict()), info))
        for name, num_tensors, report in reports:
            faults = describe_faults({**report, "mismatched_keys": []} if is_shape_forgiven else report)
            is_empty = bool(faults) and len(report["missing_keys"]) == num_tensors
            if is_empty or (strict and faults):
                raise ValueError(
                    f"The checkpoint {str(name)!r} does not fit {cls.__name__}:\n{faults}\n{suggest_remedy(report, is_empty)}"
                )
        return (model, info) if output_loading_info else model


def suggest_remedy(info: dict[str, Any], is_empty: bool) -> str:
    """What to do about a checkpoint that does not fit, by what a loading report of transformers says."""
    unexpected = sorted(info["unexpected_keys"])
    for missing in sorted(info["missing_keys"]):
        part = next((key[: -len(missing) - 1] for key in unexpected if key.endswith(f".{missing}")), None)
        if part is not None:
            return (
                f"The checkpoint is of a model that has these tensors as its part `{part}`: load that model with its own "
                f"class, and take the part's weights, `model.load_state_dict(whole.{part}.state_dict())`."
            )
    remedy = "Load it with the class and configuration it was saved with"
    if is_empty:
        return f"{remedy}: not one tensor of it belongs here."
    return f"{remedy}, or pass `strict=False` to keep what fits and initialise the rest."


def describe_faults(info: dict[str, Any], most: int = 20) -> str:
    """The tensors that a loading report of transformers names as faulty, a line a kind; empty if there are none."""
    kinds = {
        "missing in the checkpoint": sorted(info["missing_keys"]),
        "not part of the model": sorted(info["unexpected_keys"]),
        "of another shape": [
            f"{key} (checkpoint {tuple(found)}, model {tuple(expected)})"
            for key, found, expected in sorted(info["mismatched_keys"])
        ],
    }
    lines = []
    for kind, keys in kinds.items():
        if keys:
            more = f", and {len(keys) - most} more" if len(keys) > most else ""
            lines.append(f"- {len(keys)} {kind}: {', '.join(keys[:most])}{more}")
    return "\n".join(lines)


__all__ = ["StrictLoadingMixin"]
