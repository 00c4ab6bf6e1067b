"""Networks to train, as classifiers and as backbones, and multi-branch baselines.

RepOpt-VGG and RepOpt-GhostNet are those of RepOptimizers. ResNet and VGG-16 have a form for CIFAR and one for ImageNet.
The others, of Table 4 of the SGS paper, are for images of 32 x 32.
"""

from gradrep_kernels.branches.diverse import dbb_model
from gradrep_kernels.branches.dynamic import DynamicReparameterization, StructureChange
from gradrep_kernels.branches.normed import acb_model, repghost_model, repvgg_model
from gradrep_kernels.branches.quantizable import qarepvgg_model
from gradrep_kernels.models.mobilenet_v2 import mobilenet_v2
from gradrep_kernels.models.preact_resnet import preact_resnet18, preact_resnet34
from gradrep_kernels.models.pyramidnet import pyramidnet_a48, pyramidnet_a84, pyramidnet_a270
from gradrep_kernels.models.repopt_ghostnet import repopt_ghostnet, repopt_ghostnet_0_5x
from gradrep_kernels.models.repopt_vgg import (
    repopt_vgg_b1,
    repopt_vgg_b2,
    repopt_vgg_deep,
    repopt_vgg_l1,
    repopt_vgg_l2,
    repopt_vgg_small,
)
from gradrep_kernels.models.resnet import resnet18, resnet34, resnet50
from gradrep_kernels.models.shufflenet import shufflenet
from gradrep_kernels.models.stages import features
from gradrep_kernels.models.vgg import vgg11, vgg13, vgg16, vgg16_imagenet, vgg19
from gradrep_kernels.models.xception import xception

__all__ = [
    "DynamicReparameterization",
    "StructureChange",
    "acb_model",
    "dbb_model",
    "features",
    "mobilenet_v2",
    "preact_resnet18",
    "preact_resnet34",
    "pyramidnet_a48",
    "pyramidnet_a84",
    "pyramidnet_a270",
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
    "resnet34",
    "resnet50",
    "shufflenet",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg16_imagenet",
    "vgg19",
    "xception",
]
