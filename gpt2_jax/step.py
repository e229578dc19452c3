"""The training step: one call is one optimizer update, whatever the number of micro-batches and devices.

The devices of the mesh axis `data` each scan their micro-batches, in which `optax.MultiSteps` accumulates the
gradients. After the scan they are reduced over `data`, once, and the optimizer runs.

Within, each micro-batch is split over `fsdp`. The devices gather a block's parameters where the block uses them
(once more in the backward pass under `remat`, which does not keep them), and its gradients are summed into the parts
that each device holds (ZeRO stage 3, Rajbhandari et al. 2020). The optimizer works on the parts: all of it is
elementwise but for the norm, and what to add up for that is left to the compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.config import IGNORE, OptimizerConfig
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2, Params, abstract_params, init_params
from gpt2_jax.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.sharding import BATCH_AXES, batch_sharding, gather, state_sharding


class OptimizerState(NamedTuple):
    """What the optimizer keeps. Nothing is computed from `grad_norm`, but checkpoints have it."""

    inner: optax.OptState  # of `make_optimizer`
    grad_norm: jax.Array  # float32 [], as in `Metrics`, of the last update


class TrainState(NamedTuple):
    """All that changes from update to update. The data position follows from `step`.

    The accumulator of `optax.MultiSteps` is not here: each update starts it anew.
    """

    step: jax.Array  # int32 [], updates done
    params: Params
    opt_state: OptimizerState


class Metrics(NamedTuple):
    """Of one update, over the whole batch and all devices: float32 scalars."""

    loss: jax.Array  # nats per token
    grad_norm: jax.Array  # global norm of the mean gradient, before clipping
    learning_rate: jax.Array


class TrainStep(Protocol):
    """A jitted step."""

    def __call__(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        """One update; the state is donated."""

    def trace(self, state: TrainState, tokens: jax.ShapeDtypeStruct) -> jax.stages.Traced:
        """As `jax.jit`'s; the state may be shapes too."""

    def lower(self, state: TrainState, tokens: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
        """As `jax.jit`'s; the state may be shapes too."""


EvalStep = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]


def _manual(
    function: Callable[..., Any], model: GPT2, mesh: Mesh | None, axes: set[str], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` as each device along the mesh axes `axes` runs it, on its parts. No mesh: inside another one's."""
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=axes,
        # The proof that replicated results are equal everywhere; JAX's Pallas kernels cannot take part in it.
        check_vma=model.config.attention != "splash",
    )


def _axis(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The axis, if there is something to reduce over it. XLA refuses a reduction over an axis of one device beside
    one that it places itself."""
    return (name,) if mesh.shape[name] > 1 else ()


def _param_specs(model: GPT2, mesh: Mesh) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, state_sharding(mesh, abstract_params(model)))


def _gathered(model: GPT2, params: Params, specs: Any) -> tuple[GPT2, Params]:
    """What can be applied on a device that holds parts of the parameters: a model that gathers those of each block
    in the block, and parameters in which the others are whole."""
    if not any("fsdp" in spec for spec in jax.tree.leaves(specs)):
        return model, params
    block = jax.tree.map(lambda spec: P(*spec[1:]), specs["h"]) if "h" in specs else specs["h_0"]
    model = model.clone(whole=functools.partial(gather, specs=block, dtype=model.dtype))
    ends = {name: gather(params[name], specs[name], model.dtype) for name in ("wte", "wpe", "ln_f")}
    return model, params | ends


def _new_state(model: GPT2, config: OptimizerConfig, seed: int, params: Params | None = None) -> TrainState:
    params = params or init_params(model, jax.random.key(seed))
    opt_state = OptimizerState(make_optimizer(config).init(params), jnp.zeros((), jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def abstract_state(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(functools.partial(_new_state, model, config, 0), abstract_params(model))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )


def state_shardings(model: GPT2, config: OptimizerConfig, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))


def init_state(model: GPT2, config: OptimizerConfig, mesh: Mesh, seed: int, params: Params | None = None) -> TrainState:
    """A new state, created in place on the devices that hold its parts.

    Args:
        params: initial parameters, which are donated; drawn from `seed` by default.
    """
    init = functools.partial(_new_state, model, config, seed)
    shardings = state_shardings(model, config, mesh)
    state: TrainState = jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
    return state


def make_train_step(model: GPT2, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> TrainStep:
    """The jitted step: (state, tokens) -> (state, metrics). The state is donated.

    `tokens` is int32 [micro_batches, sequences, block_size + 1], sequences split over the mesh. Each pair of
    lengths compiles once.
    """
    config = model.config
    data, fsdp = _axis(mesh, "data"), _axis(mesh, "fsdp")
    chain = make_optimizer(optimizer)
    schedule = learning_rate_schedule(optimizer)
    specs = _param_specs(model, mesh)

    def micro_loss(params: Params, tokens: jax.Array, key: jax.Array) -> jax.Array:
        """One device's share of the mean nats per token of a micro-batch over `fsdp`."""
        gathering, params = _gathered(model, params, specs)
        rngs = {"dropout": key} if config.dropout else None
        hidden = gathering.apply({"params": params}, tokens[:, :-1], not config.dropout, method="hidden", rngs=rngs)
        targets = tokens[:, 1:]
        total = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
        return total / (targets.size * mesh.shape["fsdp"])

    def gradient(params: Params, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, Params]:
        """Each device's share of the loss, float32 [1], and the gradient of the whole loss by its parts."""
        if fsdp:
            key = jax.random.fold_in(key, jax.lax.axis_index(fsdp))

        def whole_ones(function: Callable[[jax.Array], jax.Array], tree: Params) -> Params:
            return jax.tree.map(lambda leaf, spec: leaf if "fsdp" in spec else function(leaf), tree, specs)

        # As `update` does for `data`: what is whole counts as different on each device until its gradient is summed.
        params = whole_ones(lambda leaf: jax.lax.pcast(leaf, fsdp, to="varying"), params)
        loss, grads = jax.value_and_grad(micro_loss)(params, tokens, key)
        return loss[None], whole_ones(lambda grad: jax.lax.psum(grad, fsdp), grads)

    over_fsdp = _manual(gradient, model, None, {"fsdp"}, (specs, P(fsdp), P()), (P(fsdp), specs))

    def update(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        micro_batches = tokens.shape[0]
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, jax.lax.axis_index(data) if data else 0)
        # Gradients with respect to parameters that count as different on each device: with respect to shared
        # ones, differentiation itself would add a reduction to every micro-step.
        params = jax.lax.pcast(state.params, data, to="varying")
        if micro_batches == 1:
            # Nothing to accumulate. And in a loop of one turn, XLA's TPU compiler would move half of the loss out of
            # it, with logits of its own.
            total, grads = over_fsdp(params, tokens[0], jax.random.fold_in(key, 0))
        else:
            total, grads = accumulated(params, tokens, key)
        loss, grads = jax.lax.pmean((jnp.sum(total) / micro_batches, grads), data)
        grad_norm = optax.global_norm(grads)
        updates, inner = chain.update(grads, state.opt_state.inner, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, OptimizerState(inner, grad_norm))
        return new, Metrics(loss, grad_norm, schedule(state.step))

    def accumulated(params: Params, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, Params]:
        """The sum of the micro-batches' losses, by shares, and the mean of their gradients."""
        micro_batches = tokens.shape[0]
        # No optimizer inside, whose state would be selected and copied at every micro-step. And one step more than
        # there are micro-batches, because at its last step it starts anew.
        no_optimizer = optax.GradientTransformation(lambda params: (), lambda grads, state, params=None: ((), state))
        accumulator = optax.MultiSteps(no_optimizer, every_k_schedule=micro_batches + 1)

        def micro_step(
            carry: tuple[optax.MultiStepsState, jax.Array], batch: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[optax.MultiStepsState, jax.Array], None]:
            mean, total = carry
            index, tokens = batch
            loss, grads = over_fsdp(params, tokens, jax.random.fold_in(key, index))
            _, mean = accumulator.update(grads, mean)
            return (mean, total + loss), None

        total = jax.lax.pcast(jnp.zeros(mesh.shape["fsdp"], jnp.float32), data, to="varying")
        (mean, total), _ = jax.lax.scan(
            micro_step, (accumulator.init(params), total), (jnp.arange(micro_batches), tokens)
        )
        return total, mean.acc_grads

    sharded = _manual(update, model, mesh, {"data"}, in_specs=(P(), P(None, data)), out_specs=(P(), P()))
    shardings = state_shardings(model, optimizer, mesh)
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        sharded,
        in_shardings=(shardings, batch_sharding(mesh, micro_batches=True)),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        keep_unused=True,  # `grad_norm` is donated too
    )


def make_eval_step(model: GPT2, mesh: Mesh) -> EvalStep:
    """The jitted evaluation: (params, tokens) -> (sum of nats, number of targets), float32 and int32 scalars.

    `tokens` is int32 [sequences, block_size + 1], sequences split over the mesh; `IGNORE` fills up.
    """
    config = model.config
    axes = _axis(mesh, "data") + _axis(mesh, "fsdp")
    specs = _param_specs(model, mesh)

    def evaluate(params: Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathering, params = _gathered(model, params, specs)
        targets = tokens[:, 1:]
        hidden = gathering.apply({"params": params}, jnp.maximum(tokens[:, :-1], 0), method="hidden")
        total = cross_entropy(hidden, params["wte"]["embedding"], targets, config.vocab_size, config.loss_chunk)
        return jax.lax.psum((total, jnp.sum(targets != IGNORE)), axes)

    sharded = _manual(evaluate, model, mesh, set(BATCH_AXES), in_specs=(specs, P(axes)), out_specs=P())
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        sharded,
        in_shardings=(None, batch_sharding(mesh, micro_batches=False)),
        out_shardings=(replicated, replicated),
    )
