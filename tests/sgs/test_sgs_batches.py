"""What the model is given of a batch: moved, cast, checked when it is drawn."""

import numpy as np
import pytest
import torch
from sgs_controllers import Named, assert_same, controller, make_batches, small_model
from torch import nn

import gradrep_kernels as gr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_batches_get_the_dtype_of_the_parameters(dtype, given, form):
    model, batches = Named().to(dtype), make_batches()
    sgs, expected = controller(model), controller(Named().to(dtype))
    batches = [batch.to(given) for batch in batches]
    expected.update([batch.to(dtype) for batch in batches])
    put = {"tensor": lambda b: b, "tuple": lambda b: (b, 3), "dict": lambda b: {"image": b, "gain": 1.0}}[form]
    sgs.update([put(batch) for batch in batches])
    assert not torch.equal(sgs.scalings["conv"], torch.ones(3, 3))
    assert_same(sgs.scalings, expected.scalings)
    assert all(batch.dtype == given for batch in batches)


class Seeing(nn.Module):
    """Its first parameter is no floating-point one, as that of a quantized table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.conv, self.seen = nn.Conv2d(2, 2, 3), []

    def forward(self, image, labels=None):
        self.seen.append((image.dtype, None if labels is None else labels.dtype))
        return self.conv(image.to(self.conv.weight.dtype) / 255)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int64])
def test_integer_tensors_keep_their_dtype(integer):
    model = Seeing().bfloat16()
    images = [(100 * batch.abs()).to(integer) for batch in make_batches()]
    sgs = gr.SpatialGradientScaling(model, torch.optim.SGD(model.conv.parameters(), lr=0.1))
    sgs.update(images)
    sgs.update([{"image": batch, "labels": image} for batch, image in zip(make_batches(), images)])
    assert model.seen == [(integer, None)] * 4 + [(torch.bfloat16, integer)] * 4


def test_nothing_is_cast_under_autocast_or_for_forward():
    model = Seeing().double()
    sgs = gr.SpatialGradientScaling(model, torch.optim.SGD(model.conv.parameters(), lr=0.1), batches=1)
    batch = make_batches(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sgs.update(batch)
    sgs.update(batch, lambda model, batch: model(batch))
    sgs.update(batch)
    assert [image for image, _ in model.seen] == [torch.float32] * 4 + [torch.float64] * 2


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_a_uint8_batch_that_the_model_does_not_take(form):
    class Strict(Named):
        def forward(self, image):
            return self.conv(image)

    sgs = controller(Strict())
    images = [(20 * batch.abs()).to(torch.uint8) for batch in make_batches()]
    put = {"tensor": lambda b: b, "tuple": lambda b: [b, 3], "dict": lambda b: {"image": b}}[form]
    with pytest.raises(TypeError, match=r"^the batch is uint8, which .* forward= is where it is prepared as in the"):
        sgs.update([put(image) for image in images])
    assert torch.equal(sgs.scalings["conv"], torch.ones(3, 3))
    with pytest.raises(TypeError) as caught:
        sgs.update(images)
    assert isinstance(caught.value.__cause__, RuntimeError)
    sgs.update(images, lambda model, image: model(image / 255))
    assert not torch.equal(sgs.scalings["conv"], torch.ones(3, 3))


def test_other_failures_of_a_model_stay_what_they_are():
    with pytest.raises(RuntimeError, match="to have 2 channels"):
        controller(Named()).update([torch.ones(2, 3, 6, 6)])  # one too many


def test_what_the_model_cannot_be_called_with_is_prepared_by_forward():
    batch = {"image": torch.ones(2, 2, 6, 6), "labels": torch.ones(2, dtype=torch.int64), "gain": 2.0}
    message = r"does not take the batch, a dict of image, labels, gain, as keyword arguments; forward= is where it is"
    with pytest.raises(TypeError, match=message):
        controller(Named()).update([batch])
    with pytest.raises(TypeError, match="the model has no forward that takes a batch; forward= is where it is called"):
        controller(nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3)})).update([torch.ones(2, 2, 6, 6)])


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ("image.png", "str"),
        ((), "tuple"),
        (["image.png", 3], "list of str"),
        (np.ones((2, 2, 6, 6), np.float32), "ndarray"),
        (None, "NoneType"),
    ],
    ids=["str", "empty", "list of str", "numpy", "None"],
)
def test_a_batch_of_another_kind_is_found_when_it_is_drawn(batch, got):
    model, calls = small_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match=rf"a batch must be a Tensor, .*; got {got} \(or give forward=\)"):
        controller(model).update([make_batches(1)[0], batch])
    assert not calls


def test_a_tuple_may_start_with_a_dict():
    model, batches = Named(), make_batches()
    sgs, expected = controller(model), controller(Named())
    sgs.update([({"image": batch, "gain": 2.0}, torch.zeros(5)) for batch in batches])
    expected.update([2 * batch for batch in batches])
    assert_same(sgs.scalings, expected.scalings)


class Mixed(nn.Module):
    """A float32 number comes first, and the convolution is of another dtype."""

    def __init__(self, dtype, first=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=first))
        self.conv = nn.Conv2d(2, 3, 3, padding=1).to(dtype)
        self.seen = []

    def forward(self, image, time=None):
        self.seen.append((image.dtype, None if time is None else time.clone()))
        return self.conv(image) * self.scale


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("dtype", "first"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_maps_are_cast_as_the_convolutions_are_and_numbers_beside_them_are_not(given, dtype, first):
    model = Mixed(dtype, first)
    time = torch.tensor([997.0, 998.0])
    batch = {"image": make_batches()[0].to(given), "time": time}
    gr.SpatialGradientScaling(model, torch.optim.SGD(model.parameters(), lr=0.1), batches=1).update([batch])
    assert [image for image, _ in model.seen] == [dtype] * 2
    assert all(torch.equal(seen, time) and seen.dtype == time.dtype for _, seen in model.seen)
    assert batch["image"].dtype == given
