from dataclasses import dataclass, field


@dataclass
class RoutedLoraConfig:
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    num_experts: int = 4
    expert_names: list = None
    ranks: list = None
    target_modules: object = None
    modules_to_save: list = None
    init_lora_weights: object = True
    use_rslora: bool = False
    router: str = "SoftRouter"
    router_arguments: dict = field(default_factory=dict)
    router_scope: str = "module"
    router_input: str = "token"
    num_tasks: int = None
    task_embedding_size: int = 64
    losses: list = ()

    def __post_init__(self):
        self.losses = [l.config() if hasattr(l, "config") else l for l in self.losses]

    def experts(self):
        return self.expert_names or [str(e) for e in range(self.num_experts)]

    def rank_of(self, name, e):
        return self.r

    def scaling_of(self, name, e):
        return self.lora_alpha / self.r
