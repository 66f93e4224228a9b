from dataclasses import dataclass


@dataclass
class InjectionReport:
    matched: list


def match_modules(model, config):
    t = config.target_modules
    names = [
        n
        for n, m in model.named_modules()
        if not n.endswith("base_layer")
        and (hasattr(m, "in_features"))
        and ((t == "all-linear" and n != "lm_head") or any(n == x or n.endswith("." + x) for x in t))
    ]
    return InjectionReport(names)
