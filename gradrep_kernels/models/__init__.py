"""Networks to train: RepOpt-VGG, RepOpt-GhostNet, VGG and ResNet-18 for CIFAR, and multi-branch baselines."""

from gradrep_kernels.branches.diverse import dbb_model
from gradrep_kernels.branches.dynamic import DynamicReparameterization, StructureChange
from gradrep_kernels.branches.normed import acb_model, repghost_model, repvgg_model
from gradrep_kernels.branches.quantizable import qarepvgg_model
from gradrep_kernels.models.repopt_ghostnet import repopt_ghostnet, repopt_ghostnet_0_5x
from gradrep_kernels.models.repopt_vgg import (
    repopt_vgg_b1,
    repopt_vgg_b2,
    repopt_vgg_deep,
    repopt_vgg_l1,
    repopt_vgg_l2,
    repopt_vgg_small,
)
from gradrep_kernels.models.resnet import resnet18
from gradrep_kernels.models.vgg import vgg11, vgg13, vgg16, vgg19

__all__ = [
    "DynamicReparameterization",
    "StructureChange",
    "acb_model",
    "dbb_model",
    "qarepvgg_model",
    "repghost_model",
    "repopt_ghostnet",
    "repopt_ghostnet_0_5x",
    "repopt_vgg_b1",
    "repopt_vgg_b2",
    "repopt_vgg_deep",
    "repopt_vgg_l1",
    "repopt_vgg_l2",
    "repopt_vgg_small",
    "repvgg_model",
    "resnet18",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]
