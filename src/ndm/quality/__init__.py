r"""Quality of generated images: features compared with those of real images.

.. math::
    \text{FID} = \|m_r - m_g\|^2 + \operatorname{tr}\bigl(S_r + S_g - 2 (S_r S_g)^{1/2}\bigr),
    \qquad \text{KID} = \text{MMD}^2 \text{ with the kernel } (a \cdot b/d + 1)^3 ,

.. math::
    \text{precision} = \operatorname{mean}_g 1\{\exists r: \|g - r\| \le \rho_k(r)\}, \qquad
    \text{recall} = \operatorname{mean}_r 1\{\exists g: \|r - g\| \le \rho_k(g)\} .

r and g are the d features of a real and of a generated image, m and S their mean and covariance,
and rho_k is the distance to the k-th nearest neighbor in the same set. Sources: Heusel et al. 2017;
Bińkowski et al. 2018; Kynkäänniemi et al. 2019. The likelihood does not predict these measures, nor
they it. :mod:`ndm.quality.classes` has two measures of samples of known classes, accuracy and
diversity.

Every measure depends on the network that computes the features; :class:`FeatureNetwork` has its
fingerprint. Only compare values with equal fingerprints and equal numbers of images: FID is biased
upward by about 1/n.
"""

from ndm.quality.classes import as_frequent, class_accuracy, class_diversity
from ndm.quality.classifier import (
    Classifier,
    classifier_features,
    classify,
    find_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ndm.quality.features import FeatureNetwork, torchscript_features
from ndm.quality.measures import SampleQuality, compare_features, precision_recall, sample_quality

__all__ = [
    "Classifier",
    "FeatureNetwork",
    "SampleQuality",
    "as_frequent",
    "class_accuracy",
    "class_diversity",
    "classifier_features",
    "classify",
    "compare_features",
    "find_classifier",
    "load_classifier",
    "precision_recall",
    "sample_quality",
    "save_classifier",
    "torchscript_features",
    "train_classifier",
]
