"""Randomised smoothing against Wasserstein perturbations: noise on flows, predictions, certified radii.

Source: Levine & Feizi 2020, "Wasserstein Smoothing: Certified Robustness against Wasserstein Adversarial Attacks".
"""

from flowverify.smoothing.certificates import CERTIFICATES, l1_radius, wasserstein_radius
from flowverify.smoothing.classifier import SmoothedClassifier
from flowverify.smoothing.noise import DISTRIBUTIONS, DOMAINS, Noise
from flowverify.smoothing.results import SmoothedCertificate, SmoothedPrediction
from flowverify.smoothing.sampling import Sampler, noisy_images
from flowverify.smoothing.splitting import SplitClassifier, Splitting

__all__ = [
    "CERTIFICATES",
    "DISTRIBUTIONS",
    "DOMAINS",
    "Noise",
    "Sampler",
    "SmoothedCertificate",
    "SmoothedClassifier",
    "SmoothedPrediction",
    "SplitClassifier",
    "Splitting",
    "l1_radius",
    "noisy_images",
    "wasserstein_radius",
]
