"""What each integration hands to the package that it is for."""

import importlib
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import torch_routers as tr
from torch_routers import metrics

BATCHES = [torch.randn(3, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]


class Layers(nn.Module):
    """Two routers that differ in their number of experts, the second without logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.learned, self.hashed = tr.TopKRouter(8, 4, 2), tr.HashRouter(32, 6)
        nn.init.normal_(self.learned.weight)

    def forward(self, x):
        self.hashed(x, token_ids=(x[:, 0] * 100).long() % 32)
        return self.learned(x).weights.sum()


def collected(model, *batches):
    with tr.collect(model) as routings:
        for x in batches:
            model(x)
    return routings


@pytest.mark.parametrize("name", ["torchmetrics", "lightning", "transformers", "peft"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.pytorch", None)
    monkeypatch.delitem(sys.modules, f"torch_routers.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"expected the package {name}, got none. Run: pip inst"):
        importlib.import_module(f"torch_routers.integrations.{name}")


# ---- torchmetrics --------------------------------------------------------------------------------


def test_the_metric_is_the_summary_of_its_window():
    from torch_routers.integrations.torchmetrics import RoutingMetric

    model = Layers()
    metric = RoutingMetric(model)
    for x in BATCHES:
        metric.update(collected(model, x))
    expected = metrics.summary(collected(model, *BATCHES))
    assert_close(metric.compute(), expected)
    metric.reset()
    of_one = metric(collected(model, BATCHES[0]))  # of the batch alone, and added to the window
    assert_close(of_one, metrics.summary(collected(model, BATCHES[0])))
    metric.update(collected(model, *BATCHES[1:]))
    assert_close(metric.compute(), expected)


def test_the_metric_of_one_layer():
    from torch_routers.integrations.torchmetrics import RoutingMetric

    model = Layers()
    metric = RoutingMetric(model, layer="learned")
    metric.update(routings := collected(model, BATCHES[0]))
    everything = metrics.summary(routings)
    expected = {name: value for name, value in everything.items() if "/learned/" in name}
    assert_close(metric.compute(), expected)
    with pytest.raises(ValueError, match=r"expected layer among \['learned', 'hashed'\], got 'x'"):
        RoutingMetric(model, layer="x")


def test_the_metric_of_two_ranks_is_that_of_all_their_tokens():
    from torch_routers.integrations.torchmetrics import RoutingMetric

    model = Layers()
    other = RoutingMetric(model)
    other.update(collected(model, *BATCHES[:5]))
    states = iter([getattr(other, field) for field in metrics.Totals._fields])
    here = RoutingMetric(
        model,
        dist_sync_fn=lambda state, group: [state, next(states)],
        distributed_available_fn=lambda: True,
    )
    here.update(collected(model, *BATCHES[5:]))
    assert_close(here.compute(), metrics.summary(collected(model, *BATCHES)))


# ---- tensorboard ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["routings", "meter"])
def test_tensorboard_gets_scalars_and_a_bar_for_each_expert(tmp_path, window):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from torch_routers.integrations.tensorboard import log_routings

    model = Layers()
    routings = collected(model, BATCHES[0])
    meter = metrics.RoutingMeter(model)
    meter.update(routings)
    with SummaryWriter(tmp_path) as writer:
        log_routings(writer, routings if window == "routings" else meter.totals, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    expected = metrics.read(metrics.summary(routings))
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (7, pytest.approx(value))
    assert set(events.Tags()["histograms"]) == {"router/learned/load", "router/hashed/load"}
    for name, routing in zip(routings.names, routings):
        (event,) = events.Histograms(f"router/{name}/load")
        bars = dict(zip(event.histogram_value.bucket_limit, event.histogram_value.bucket))
        assert bars == {e + 0.5: count for e, count in enumerate(routing.counts.tolist())}
        chosen = routing.indices.double()
        assert event.histogram_value.num == chosen.numel()
        assert event.histogram_value.sum == chosen.sum()
        assert event.histogram_value.sum_squares == chosen.square().sum()


def test_tensorboard_gets_nothing_of_no_routings():
    from torch_routers.integrations.tensorboard import log_routings

    log_routings(None, [], step=0)


# ---- lightning -----------------------------------------------------------------------------------


class Controller:
    """Looks at what it finds when it is called."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append(self.model.layers.learned.weight.grad.clone())


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning.pytorch")


def fit(lightning, tmp_path, *, losses=(), on_batch=lambda module, index: None, **options):
    """Four steps of two micro-batches each; what was logged, the model, the controller."""
    from torch_routers.integrations.lightning import RoutingCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = Layers()
            router = tr.TopKRouter(8, 4, 2, losses=losses)
            self.moe = tr.MoE(router, tr.SwiGLUExperts(4, 8, 6))

        def training_step(self, x, index):
            on_batch(self, index)
            return self.layers(x) + self.moe(x).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Log(lightning.loggers.logger.DummyLogger):
        written = []  # noqa: RUF012

        def log_metrics(self, values, step=None):
            self.written.append((step, values))

    Log.written = []
    module = Module()
    controller = Controller(module)
    callback = RoutingCallback(controller=controller, **options)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=Log(),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(BATCHES, batch_size=None))
    logged = [(step, values) for step, values in Log.written if "router/moe.router/ess" in values]
    return logged, module, controller


def test_lightning_logs_all_tokens_of_every_nth_step(lightning, tmp_path):
    logged, module, _ = fit(lightning, tmp_path, every_n_steps=2)
    assert [step for step, _ in logged] == [0, 2]
    for step, values in logged:
        batches = BATCHES[2 * step : 2 * step + 2]
        with tr.collect(module) as routings:
            for x in batches:
                module.training_step(x, 0)
        assert values == pytest.approx(metrics.read(metrics.summary(routings)))


def test_lightning_balances_once_per_step_when_backward_is_done(lightning, tmp_path):
    _, module, controller = fit(lightning, tmp_path)
    assert len(controller.gradients) == 4
    module.zero_grad()
    for x in BATCHES[-2:]:
        (module.training_step(x, 0) / 2).backward()
    assert_close(controller.gradients[-1], module.layers.learned.weight.grad)


def test_lightning_callback_stops_looking_when_training_fails(lightning, tmp_path):
    modules = []

    def interrupt(module, index):
        modules.append(module)
        raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        fit(lightning, tmp_path, on_batch=interrupt)
    routing = modules[0].layers.learned(BATCHES[0])
    weights = weakref.ref(routing.weights)
    del routing
    assert weights() is None  # nobody kept it


def test_lightning_callback_is_no_destination_for_losses(lightning, tmp_path):
    with pytest.raises(RuntimeError, match="MoE: expected a destination for 1 losses"):
        fit(lightning, tmp_path, losses=[tr.losses.ZLoss(1e-3)])


def test_lightning_callback_checks_its_argument(lightning):
    from torch_routers.integrations.lightning import RoutingCallback

    with pytest.raises(ValueError, match="RoutingCallback: expected every_n_steps >= 1, got 0"):
        RoutingCallback(every_n_steps=0)
