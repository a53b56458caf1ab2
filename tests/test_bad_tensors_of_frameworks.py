"""TensorFlow tensors and JAX arrays that cannot be averaged, what `like=` may hold, and what can be written to."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from tensor_kinds import KERNELS, KINDS, Kind, bits, host, jax, jnp, keras, of, streamed, tf

import fed_learn as fl


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# What is refused.


def in_a_graph(make: Callable[[], Any]) -> Any:
    """A symbolic tensor, taken out of the graph that it belongs to."""
    with tf.Graph().as_default():
        return make()


def deleted() -> Any:
    array = jnp.ones((2, 2))
    array.delete()
    return array


BAD: dict[str, tuple[Callable[[], Any], type[fl.FedLearnError], str]] = {
    "tf graph": (lambda: in_a_graph(lambda: tf.ones((2, 2))), fl.WeightsTypeError, "graph"),
    "tf string": (lambda: tf.constant([["a", "b"]]), fl.DtypeError, "string"),
    "tf complex": (lambda: tf.ones((2, 2), tf.complex64), fl.DtypeError, "complex64"),
    "tf quantized": (lambda: tf.bitcast(tf.ones((2, 2), tf.int8), tf.qint8), fl.DtypeError, "qint8"),
    "tf variant": (lambda: tf.raw_ops.EmptyTensorList(
        element_shape=(2,), max_num_elements=2, element_dtype=tf.float32), fl.DtypeError, "variant"),
    "tf ragged": (lambda: tf.ragged.constant([[1.0], [2.0, 3.0]]), fl.WeightsTypeError, "RaggedTensor, not a numpy"),
    "tf sparse": (lambda: tf.sparse.from_dense(tf.eye(2)), fl.WeightsTypeError, "SparseTensor, not a numpy"),
    "tf spec": (lambda: tf.TensorSpec((2, 2)), fl.WeightsTypeError, "is a TensorSpec, which has no values"),
    "keras symbolic": (lambda: keras.Input((2,)), fl.WeightsTypeError, "KerasTensor, not a numpy"),
    "tf shape": (lambda: tf.ones(4), fl.ShapeError, "shape"),
    "tf dtype": (lambda: tf.ones((2, 2), tf.float64), fl.DtypeError, "float64, expected float32"),
    "tf nan": (lambda: tf.constant([[0, 1], [np.nan, 0]]), fl.NonFiniteError, r"\(1, 0\): nan"),
    "variable inf": (lambda: tf.Variable([[0, 1], [-np.inf, 0]]), fl.NonFiniteError, r"\(1, 0\): -inf"),
    "jax key": (lambda: jax.random.split(jax.random.key(0), (2, 2)), fl.DtypeError, "key<fry>"),
    "jax complex": (lambda: jnp.ones((2, 2), jnp.complex64), fl.DtypeError, "complex64"),
    "jax float8": (lambda: jnp.ones((2, 2), jnp.float8_e4m3fn), fl.DtypeError, "float8_e4m3fn"),
    "jax int4": (lambda: jnp.ones((2, 2), jnp.int4), fl.DtypeError, "int4"),
    "jax struct": (lambda: jax.ShapeDtypeStruct((2, 2), np.float32), fl.WeightsTypeError, "has no values: it is what"),
    "jax deleted": (deleted, fl.WeightsTypeError, "donated or deleted"),
    "jax shape": (lambda: jnp.ones((2, 1)), fl.ShapeError, "shape"),
    "jax dtype": (lambda: jnp.ones((2, 2), jnp.float16), fl.DtypeError, "float16, expected float32"),
    "jax nan": (lambda: jnp.array([[0, 1], [np.nan, 0]]), fl.NonFiniteError, r"\(1, 0\): nan"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_tensor_is_refused_by_contributor_and_variable(bad: str) -> None:
    make, error, words = BAD[bad]
    good: Any = {"v": jnp.zeros(3), "w": tf.ones((2, 2))}
    for kernel in KERNELS:
        sent = [fl.Contribution("site-1", good, 1), fl.Contribution("site-2", good | {"w": make()}, 1)]
        with pytest.raises(error, match=f"site-2: 'w'.*{words}") as caught:
            fl.weighted_average(sent, kernel=kernel)
        assert (caught.value.contributor, caught.value.name) == ("site-2", "w")
        stream = fl.Accumulator(kernel=kernel)
        stream.add(sent[0])
        with pytest.raises(error) as again:
            stream.add(sent[1])
        assert str(again.value) == str(caught.value)
        assert stream.contributors == ("site-1",)
        assert bits(stream.result()) == bits(good)


def test_a_dict_that_holds_only_what_is_no_tensor_is_refused_by_name() -> None:
    for bad in ("tf ragged", "tf sparse", "keras symbolic"):
        with pytest.raises(fl.WeightsTypeError, match=f"'w' .*{BAD[bad][2]}"):
            fl.weighted_average([of(w=BAD[bad][0]())])


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_averages_are_refused_where_jax_traces(transform: str) -> None:
    def traced(x: Any) -> Any:
        fl.weighted_average([fl.Contribution("site-1", of(w=x), 1)])
        return x.sum()

    with pytest.raises(fl.WeightsTypeError, match=r"site-1: 'w' has no values inside of a function that JAX traces"):
        getattr(jax, transform)(traced)(jnp.ones((2, 2)))
    with pytest.raises(fl.WeightsTypeError, match="'w' has no values"):
        jax.jit(lambda key: fl.weighted_average([of(w=key)]))(jax.random.key(0))


def test_averages_are_refused_in_a_tf_function() -> None:
    variable, eager = tf.Variable([1.0]), tf.constant([1.0])
    for tensor in (lambda x: x, lambda _: variable, lambda _: eager):

        @tf.function  # type: ignore[untyped-decorator, unused-ignore]
        def graph(x: Any, tensor: Any = tensor) -> Any:
            with pytest.raises(fl.WeightsTypeError, match=r"site-1: 'w' has no values inside of a tf\.function"):
                fl.weighted_average([fl.Contribution("site-1", of(w=tensor(x)), 1)])
            return x

        graph(tf.ones(1))


# What `like=` may hold.


def test_of_like_only_names_shapes_and_dtypes_are_read() -> None:
    array = np.array([[1, 2, 4]], np.float32)
    described: dict[str, Any] = {
        "torch": torch.empty(1, 3, device="meta"),
        "jax": jax.ShapeDtypeStruct((1, 3), np.float32),
        "jax deleted": jnp.zeros((1, 3)),
        "tf": tf.TensorSpec((1, 3)),
        "numpy": np.zeros((1, 3), np.float32),
    }
    described["jax deleted"].delete()
    for first in (array, torch.from_numpy(array), jnp.asarray(array), tf.constant(array)):
        client: dict[str, Any] = dict.fromkeys(described, first)
        for kernel in KERNELS:
            mean: Any = fl.weighted_average([client, client], like=described, kernel=kernel)
            stream = fl.Accumulator(like=described, kernel=kernel)
            stream.add(client, 2)
            for result in (mean, stream.result()):
                assert bits(result) == ref.bits(dict.fromkeys(described, array))
            short = described | {"tf": tf.TensorSpec((1, 2))}
            with pytest.raises(fl.ShapeError, match=r"'tf' has shape \(1, 3\), expected \(1, 2\)"):
                fl.weighted_average([client], like=short, kernel=kernel)
            with pytest.raises(fl.ShapeError, match=r"'tf' has shape \(1, 3\), expected \(1, 2\)"):
                fl.Accumulator(like=short, kernel=kernel).add(client, 1)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (lambda: tf.TensorSpec((None, 3)), fl.WeightsTypeError, "TensorSpec without a definite shape"),
        (lambda: tf.TensorSpec(None), fl.WeightsTypeError, "TensorSpec without a definite shape"),
        (lambda: tf.TensorSpec((1, 3), tf.string), fl.DtypeError, "string"),
        (lambda: jax.ShapeDtypeStruct((1, 3), np.complex64), fl.DtypeError, "complex64"),
        (lambda: torch.empty(1, 3, device="meta", dtype=torch.complex64), fl.DtypeError, "complex64"),
    ],
)
def test_like_without_a_shape_or_a_dtype_that_can_be_averaged_is_refused(bad: Any, error: Any, words: str) -> None:
    client, like = of(v=np.ones(2), w=np.ones((1, 3))), of(v=np.ones(2), w=bad())
    for use in (lambda: fl.weighted_average([client], like=like), lambda: fl.Accumulator(like=like)):
        with pytest.raises(error, match=f"'w' .*{words}") as caught:
            use()
        assert caught.value.name == "w"


# Outputs.


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", ["tf.Variable", "keras.Variable", "torch", "numpy"])
def test_out_is_written_whatever_the_framework_of_the_contributions(
    kind: Kind, kernel: str | None, target: str
) -> None:
    arrays = [{"w": np.full((2, 3), i, np.float32), "n": np.array(2 * i)} for i in (1, 2, 6)]
    zeros = {name: np.zeros_like(array) for name, array in arrays[0].items()}
    clients = [kind.of(one) for one in arrays]
    for exact in (False, True):
        stream = streamed(clients, [1, 1, 1], exact=exact, kernel=kernel)
        batch = functools.partial(fl.weighted_average, clients, exact=exact, kernel=kernel)
        for write in (lambda out, batch=batch: batch(out=out), stream.result):
            if target in KINDS:
                out = KINDS[target].of(zeros)
            else:
                out = {n: torch.from_numpy(a.copy()) if target == "torch" else a.copy() for n, a in zeros.items()}
            held = dict(out)
            assert write(out) is out
            assert all(out[name] is held[name] for name in held)
            assert host(out["w"]).tolist() == [[3] * 3] * 2
            assert host(out["n"]).tolist() == 6


def test_tensors_and_arrays_that_cannot_be_changed_are_refused_as_out_before_anything_is_computed(kind: Kind) -> None:
    client = of(a=kind.make(np.ones(2, np.float32)), w=kind.make(np.ones(2, np.float32)))
    nan = of(a=client["a"], w=kind.make(np.array([np.nan, 1], np.float32)))
    stream = streamed([client], [1])
    for fixed, words in ((tf.zeros(2), "TensorFlow tensor"), (jnp.zeros(2), "JAX array")):
        array = np.full(2, 7, np.float32)
        out = of(a=array, w=fixed)
        for write in (lambda out: fl.weighted_average([client, nan], out=out), stream.result):
            with pytest.raises(fl.OutputError, match=f"out: 'w' is a {words}, which cannot be changed") as caught:
                write(out)
            assert caught.value.name == "w"
            assert array.tolist() == [7, 7]


def test_a_variable_that_is_an_input_is_refused_as_out() -> None:
    clients = [of(w=tf.Variable([float(i)])) for i in range(2)]
    with pytest.raises(fl.OutputError, match="'w' is an input as well"):
        fl.weighted_average(clients, out=clients[1])
    kept = of(w=keras.Variable(np.ones(1, np.float32)))
    with pytest.raises(fl.OutputError, match="'w' is an input as well"):
        fl.weighted_average([kept], out=kept)
    started = of(w=tf.Variable(clients[0]["w"].read_value()))  # shares memory until one of them is assigned to
    assert fl.weighted_average(clients, out=started) is started
    assert [float(one["w"][0]) for one in (*clients, started)] == [0, 1, 0.5]


def test_one_variable_of_two_names_is_refused_as_out() -> None:
    variable, client = tf.Variable([7.0]), of(a=jnp.ones(1), b=jnp.zeros(1))
    for write in (lambda out: fl.weighted_average([client], out=out), streamed([client], [1]).result):
        with pytest.raises(fl.OutputError, match="'a' and 'b' are one variable"):
            write(of(a=variable, b=variable))
    assert variable.numpy().tolist() == [7]


def test_out_of_another_schema_is_refused() -> None:
    client = of(w=jnp.ones(2))
    for out, error in (
        (of(w=tf.Variable(tf.zeros(3))), fl.ShapeError),
        (of(w=tf.Variable(tf.zeros(2, tf.float64))), fl.DtypeError),
        (of(v=tf.Variable(tf.zeros(2))), fl.NamesError),
    ):
        for write in (lambda out: fl.weighted_average([client], out=out), streamed([client], [1]).result):
            with pytest.raises(error, match="out"):
                write(out)
