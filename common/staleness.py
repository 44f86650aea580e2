"""Staleness: how many optimizer steps old a sampled token is. One definition, used by everything."""

import numpy as np

NOT_SAMPLED = -1
"""token_versions holds this where the policy did not sample the token (prompt and environment tokens)."""


def token_staleness(token_versions_T: np.ndarray, *, current: int) -> np.ndarray:
    """Age of each token, in optimizer steps, if it were trained by the step that updates version `current`.

    token_versions_T: [T] int32, NOT_SAMPLED where no policy sampled the token; those are 0 steps old.
    Returns [T] int32. Negative values mean a version from the future, which only a liar can claim.
    """
    return np.where(token_versions_T == NOT_SAMPLED, 0, np.int32(current) - token_versions_T).astype(np.int32)


def oldest_version(token_versions_T: np.ndarray) -> int:
    """The smallest policy version that sampled any of the tokens; raises ValueError if none was sampled."""
    sampled = token_versions_T[token_versions_T != NOT_SAMPLED]
    if sampled.size == 0:
        raise ValueError(f"none of the {token_versions_T.size} tokens was sampled by a policy")
    return int(sampled.min())
