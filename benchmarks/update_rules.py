"""What each choice of Muon costs: milliseconds of an optimizer step, and bytes that it keeps.

    python benchmarks/update_rules.py                the matrices of configuration P, one thread
    python benchmarks/update_rules.py mini --rounds 41   those of a preset

Only the optimizer is timed, on gradients at random: what a step of training takes beside it is
the same for all. The choices take turns within a round, so that a slow minute of the machine meets
all of them; a choice's time is the median over rounds, its ratio that of the rounds' own ratios to
the plain rule. Loss is the business of benchmarks/ablations.py.
"""

import torch
from measure import arguments, finish, median, seconds, settings, t, table

CHOICES = {
    "plain": "",
    "Polar Express": "MUON_NS=polar",
    "rows of one norm": "MUON_ROW_NORM=1",
    "even neurons (NorMuon)": "MUON_NEURON_NORM=0.95",
    "cautious decay": "MUON_WD_FORM=cautious",
    "slower momentum beside": "MUON_SLOW_SHARE=0.5615",
    "int8 momentum": "MUON_QUANT_MOMENTUM=1",
    "int8, slower beside": "MUON_QUANT_MOMENTUM=1 MUON_SLOW_SHARE=0.5615",
    "all but int8": "MUON_NS=polar MUON_ROW_NORM=1 MUON_NEURON_NORM=0.95 "
    "MUON_WD_FORM=cautious MUON_SLOW_SHARE=0.5615",
}


class Choice:
    """Muon under one choice, on its own copy of a configuration's matrices."""

    def __init__(self, configuration: str, changes: str) -> None:
        changed = dict(change.split("=", 1) for change in changes.split())
        cfg, _ = t.Config.from_env(settings(configuration) | changed)
        model = t.GPT(cfg)
        t.initialize(model, cfg)
        groups = t.route_parameters(cfg, model)
        self.muon = t.build_optimizers(cfg, groups, torch.float32)[1]
        for group in self.muon.param_groups:
            group.update(lr=1e-3, momentum=0.95, slow_share=cfg.muon_slow_share)
        self.weights = [weight for _, weights in self.muon.stacks for weight in weights]
        self.gradients = [torch.randn_like(weight) for weight in self.weights]

    def step(self) -> float:
        """Milliseconds of one step; laying out the gradients is not timed."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient.clone()
        return 1e3 * seconds(self.muon.step)

    def kept_bytes(self) -> int:
        """Bytes of all that the optimizer keeps between steps."""
        return sum(
            part.numel() * part.element_size()
            for kept in self.muon.state.values()
            for parts in kept.values()
            for part in parts
        )


def main() -> None:
    """Time all choices in turn, and print the table."""
    rounds = {"type": int, "default": 21, "help": "how often each choice steps"}
    given = arguments(__doc__, rounds=rounds)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    configuration = given.configuration
    choices = {name: Choice(configuration, changes) for name, changes in CHOICES.items()}
    taken: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(given.rounds + 2):
        for name, choice in choices.items():
            taken[name].append(choice.step())
    warm = {name: times[2:] for name, times in taken.items()}
    rows = []
    for name, choice in choices.items():
        ratios = [own / plain for own, plain in zip(warm[name], warm["plain"], strict=True)]
        rows.append((name, median(warm[name]), median(ratios), choice.kept_bytes() / 2**20))
    plain = choices["plain"]
    numbers = sum(weight.numel() for weight in plain.weights)
    print(f"{configuration}: {len(plain.weights)} matrices, {numbers:,} weights")
    table(("choice", "ms a step", "of plain", "MiB kept"), rows)
    finish({"rules": rows, "configuration": configuration}, given.json)


if __name__ == "__main__":
    main()
