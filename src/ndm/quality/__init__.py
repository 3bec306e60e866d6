r"""How good samples look, measured on features of images, against images that are real.

.. math::
    \text{FID} = \|m_r - m_g\|^2 + \operatorname{tr}\bigl(S_r + S_g - 2 (S_r S_g)^{1/2}\bigr), \qquad
    \text{KID} = \text{MMD}^2 \text{ with the kernel } (a \cdot b/d + 1)^3 ,

.. math::
    \text{precision} = \operatorname{mean}_g 1\{\exists r: \|g - r\| \le \rho_k(r)\}, \qquad
    \text{recall} = \operatorname{mean}_r 1\{\exists g: \|r - g\| \le \rho_k(g)\} .

r and g are d features of a real and of a generated image, m and S their mean and covariance, rho_k
the distance to the k-th nearest neighbor within the own set. Sources: Heusel et al. 2017; Bińkowski
et al. 2018; Kynkäänniemi et al. 2019. A likelihood says nothing of these, nor they of the
likelihood.

Every number depends on the network that makes the features. :class:`FeatureNetwork` carries a
fingerprint of it, and two numbers can be compared only if their fingerprints, and their numbers of
images, agree: FID is biased upward by about 1/n.
"""

from ndm.quality.classifier import (
    Classifier,
    classifier_features,
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
    "classifier_features",
    "compare_features",
    "find_classifier",
    "load_classifier",
    "precision_recall",
    "sample_quality",
    "save_classifier",
    "torchscript_features",
    "train_classifier",
]
