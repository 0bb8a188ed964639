"""Randomised smoothing against Wasserstein perturbations: noise on flows, predictions, certified radii.

Source: Levine & Feizi 2020, "Wasserstein Smoothing: Certified Robustness against Wasserstein Adversarial Attacks".
"""

from flowverify.smoothing.classifier import SmoothedCertificate, SmoothedClassifier, SmoothedPrediction
from flowverify.smoothing.noise import CERTIFICATES, DISTRIBUTIONS, DOMAINS, Noise, l1_radius, wasserstein_radius
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
