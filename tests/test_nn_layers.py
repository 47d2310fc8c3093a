"""Which weight belongs to which task norm: found in models of every style, left out where it cannot be known."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, relu

import mtlkernels as mtl
from mtlkernels.nn import Layer, TaskBatchNorm1d, TaskBatchNorm2d, TaskLayerNorm, find_layers, to_task_norms


def found(net: nn.Module, *inputs: Tensor) -> dict[str, tuple[str, str]]:
    """Name of each weight -> name of its norm and the side it is on."""
    weights, norms = ({id(v): k for k, v in named} for named in (net.named_parameters(), net.named_modules()))
    layers = find_layers(net, lambda: net(*inputs))
    return {weights[id(layer.weight)]: (norms[id(layer.norm)], layer.side) for layer in layers}


class Residual(nn.Module):
    """A block of ResNet, with a projection, or a block before activation (He et al. 2016)."""

    def __init__(self, inputs: int, channels: int, preactivation: bool) -> None:
        super().__init__()
        self.preactivation = preactivation
        self.bn1 = nn.BatchNorm2d(inputs if preactivation else channels)  # registered in another order than they run
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.project = nn.Sequential(nn.Conv2d(inputs, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.preactivation:
            return self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x)))))) + self.project(x)
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.project(x)
        return relu(y, inplace=True)


def test_residual_blocks():
    net = to_task_norms(nn.Sequential(Residual(3, 4, False), Residual(4, 4, False)), 2)
    assert found(net, torch.randn(2, 3, 5, 5)) == {
        f"{n}.{conv}.weight": (f"{n}.{norm}", "after")
        for n in (0, 1)
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("project.0", "project.1"))
    }


def test_preactivation_blocks():
    """bn1 follows a sum of convolutions, which no single weight's variance is of."""
    net = to_task_norms(nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4, 4, True), Residual(4, 4, True)), 2)
    assert found(net, torch.randn(2, 3, 5, 5)) == {
        "0.weight": ("1.bn1", "after"),
        "1.conv1.weight": ("1.bn2", "after"),
        "1.project.0.weight": ("1.project.1", "after"),
        "2.conv1.weight": ("2.bn2", "after"),
        "2.project.0.weight": ("2.project.1", "after"),
    }


def test_grouped_and_depthwise_convolutions_linear_layers_and_casts():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.one = nn.BatchNorm2d(4)
            self.grouped = nn.Conv2d(4, 8, 1, groups=2)
            self.two = nn.BatchNorm2d(8)
            self.linear = nn.Linear(8, 6)
            self.three = nn.BatchNorm1d(6)
            self.of_sequence = nn.Linear(6, 5, bias=False)
            self.four = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.grouped(self.one(self.depthwise(x)))).mean((2, 3))
            x = torch.tanh(self.three(self.linear(x)))
            return self.four(self.of_sequence(x.unsqueeze(1).expand(-1, 7, -1)).transpose(1, 2))

    net = to_task_norms(Net(), 2)
    expected = {
        "depthwise.weight": ("one", "after"),
        "grouped.weight": ("two", "after"),
        "linear.weight": ("three", "after"),
        "of_sequence.weight": ("four", "after"),
    }
    assert found(net, torch.randn(3, 4, 5, 5)) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(net, torch.randn(3, 4, 5, 5)) == expected


@pytest.mark.parametrize("affine", [True, False])
def test_functional_convolution_and_a_norm_without_scales(affine):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 2, 1, 1))
            self.norm = nn.BatchNorm2d(4, affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(conv2d(x, self.kernel))

    assert found(to_task_norms(Net(), 2), torch.randn(3, 2, 4, 4)) == {"kernel": ("norm", "after")}


class LeftOut(nn.Module):
    """Weights that no single norm tells the priority of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        if kind == "transposed":  # its output channels are no rows of the weight
            self.conv = nn.ConvTranspose2d(4, 4, 1)
        elif kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.conv)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "two norms":
            return self.norm2(self.conv(relu(self.norm1(self.conv(x)))))
        if self.kind == "once without":
            return self.conv(relu(self.norm1(self.conv(x))))
        if self.kind == "activation between":
            return self.norm1(relu(self.conv(x)))
        if self.kind == "sum":
            return self.norm1(self.conv(x) + self.conv(x))
        if self.kind == "columns":  # y = x W: the output channels are the columns of W
            return self.norm1((x.permute(0, 2, 3, 1) @ self.matrix).permute(0, 3, 1, 2))
        return self.norm1(self.conv(x))


@pytest.mark.parametrize(
    "kind", ["transposed", "weight norm", "two norms", "once without", "activation between", "sum", "columns"]
)
def test_left_out_where_it_cannot_be_known(kind):
    net = to_task_norms(LeftOut(kind), 2)
    assert found(net, torch.randn(2, 4, 3, 3, requires_grad=True)) == {}
    assert found(to_task_norms(LeftOut("plain"), 2), torch.randn(2, 4, 3, 3)) == {"conv.weight": ("norm1", "after")}


def test_every_task_must_agree():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.only_a = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.second = TaskBatchNorm2d(4, ["a", "b"]), TaskBatchNorm2d(4, ["a", "b"])

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(x))
            return self.second(self.only_a(x)) if self.second.index() == 0 else x

    net = Net()
    assert found(net, torch.randn(2, 2, 3, 3)) == {"conv.weight": ("norm", "after")}


# --- transformers (ours) --------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.dropout(self.attention(h, h, h, need_weights=False)[0])
        return x + self.down(gelu(self.up(self.norm2(x))))


def test_pre_norm_transformer():
    net = nn.Sequential(nn.Linear(3, 8), PreNorm(), PreNorm(), nn.LayerNorm(8), nn.Linear(8, 2))
    to_task_norms(net, 2, layer_norms=True)
    assert found(net, torch.randn(2, 4, 3)) == {
        "0.weight": ("1.norm1", "after"),
        "1.attention.in_proj_weight": ("1.norm1", "before"),
        "1.attention.out_proj.weight": ("1.norm2", "after"),
        "1.up.weight": ("1.norm2", "before"),
        "1.down.weight": ("2.norm1", "after"),
        "2.attention.in_proj_weight": ("2.norm1", "before"),
        "2.attention.out_proj.weight": ("2.norm2", "after"),
        "2.up.weight": ("2.norm2", "before"),
        "2.down.weight": ("3", "after"),
        "4.weight": ("3", "before"),
    }


def test_post_norm_transformer():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    to_task_norms(net, 2, layer_norms=True)
    layers = found(net, torch.randn(2, 4, 8))
    assert layers["layers.0.self_attn.out_proj.weight"] == ("layers.0.norm1", "after")
    assert layers["layers.0.linear1.weight"] == ("layers.0.norm1", "before")
    assert layers["layers.1.self_attn.in_proj_weight"] == ("layers.0.norm2", "before")
    assert layers["layers.1.linear2.weight"] == ("layers.1.norm2", "after")
    assert "layers.0.self_attn.in_proj_weight" not in layers


def test_strength_of_a_norm_before_a_layer_is_that_of_the_weight_a_task_sees():
    norm = TaskLayerNorm(5, ["a", "b"])
    weight = nn.Parameter(torch.randn(7, 5))
    for scale in norm.weight:
        nn.init.normal_(scale)
    layer = Layer(weight, norm, "before")
    strength, top = mtl.connection_strength(*layer.strength(["a", "b"]))
    seen = torch.stack([(weight * scale).square().sum(1) for scale in norm.weight]).double()
    expected = seen / seen.sum(1, keepdim=True)
    # float32 squares and sums of 5 of them; eps = 1e-5 is added to a variance of 1 for all alike and cancels.
    torch.testing.assert_close(strength, expected.detach(), rtol=1e-6, atol=0)
    assert torch.equal(top, expected.argmax(0))


def test_strength_of_a_norm_after_a_layer():
    norm = TaskBatchNorm1d(7, ["a", "b"])
    norm.running_var.copy_(0.5 + torch.rand(2, 7))
    for scale in norm.weight:
        nn.init.normal_(scale)
    weight = nn.Parameter(torch.randn(7, 5))
    value, scale, variance = Layer(weight, norm).strength(["b", "a"])
    assert value.data_ptr() == weight.data_ptr()
    assert torch.equal(scale, torch.stack([norm.weight[1], norm.weight[0]]))
    assert torch.equal(variance, norm.running_var.flip(0))


# --- the interface --------------------------------------------------------------------------------------------------------


def test_finding_leaves_statistics_and_gradients_as_they_were():
    net = to_task_norms(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)), 2)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        assert len(find_layers(net, lambda: {"out": [net(torch.randn(3, 2, 4, 4))]})) == 1
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ZeroDivisionError):
        find_layers(net, lambda: net(torch.randn(3, 2, 4, 4)) / (1 // 0))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))


def test_bad_layers():
    weight = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match="norm is a BatchNorm2d; pass a task norm"):
        Layer(weight, nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 3\), its norm 3 channels"):
        Layer(weight, TaskBatchNorm1d(3, 2))
    with pytest.raises(ValueError, match="a norm before a layer is a TaskLayerNorm"):
        Layer(weight, TaskBatchNorm1d(3, 2), "before")
    with pytest.raises(ValueError, match="side is 'in'"):
        Layer(weight, TaskBatchNorm1d(4, 2), "in")
    with pytest.raises(ValueError, match="model, a Linear, has no task norms"):
        find_layers(nn.Linear(2, 2), lambda: None)
