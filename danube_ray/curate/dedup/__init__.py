"""Duplicates: equal texts by fingerprint, near ones by MinHash and their real similarity, and which one is kept."""

from danube_ray.curate.dedup.clusters import Choice, by_preference, choose, forest, members, star_pairs
from danube_ray.curate.dedup.fingerprints import FINGERPRINT_BYTES, fingerprint
from danube_ray.curate.dedup.minhash import BANDS, band_keys, jaccard, shingles, signature

__all__ = [
    "BANDS",
    "FINGERPRINT_BYTES",
    "Choice",
    "band_keys",
    "by_preference",
    "choose",
    "fingerprint",
    "forest",
    "jaccard",
    "members",
    "shingles",
    "signature",
    "star_pairs",
]
