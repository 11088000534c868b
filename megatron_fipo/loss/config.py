"""The settings of the losses."""

from dataclasses import dataclass

from megatron_fipo.loss.kl import check_estimator

SEMANTICS = ("official", "paper")
NORMALIZATIONS = ("token", "group", "sequence")
RATIOS = ("gspo", "cispo")

_PRESETS: dict[str, dict] = {
    "fipo-32b": {},
    "fipo-7b": {"weight_low": 0.8, "safety_threshold": 3.0},
    "dapo": {"weight_low": 1.0, "weight_high": 1.0, "sequence_filter": False},
}


@dataclass(frozen=True)
class FipoConfig:
    """Defaults are the 32B recipe. Raises ValueError for values out of range.

    half_life: tokens after which a log-ratio counts half in the future KL.
    weight_low, weight_high: range of the influence weight f; (1, 1) is DAPO, (0, inf) leaves it unclipped.
    safety_threshold: A < 0 and r above it resets f; inf switches that off.
    dual_clip: c, both the bound of the loss for A < 0 and the ratio above which a token leaves the future KL.
    clip_low, clip_high: r is clipped to [1 - clip_low, 1 + clip_high].
    semantics: "official" as in the released code, "paper" as in arXiv 2603.19835; where they differ see fipo.py.
    normalization: "token", "group" or "sequence"; None takes token (official) or group (paper).
    sequence_filter: drop responses with more than one token that has A < 0 and r > c; None takes True (official) or
        False (paper).
    """

    half_life: float = 32.0
    weight_low: float = 1.0
    weight_high: float = 1.2
    safety_threshold: float = 10.0
    dual_clip: float = 10.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    semantics: str = "official"
    normalization: str | None = None
    sequence_filter: bool | None = None

    def __post_init__(self) -> None:
        if self.semantics not in SEMANTICS:
            raise ValueError(f"semantics must be one of {', '.join(SEMANTICS)}, not {self.semantics!r}")
        if self.normalization is not None and self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {self.normalization!r}")
        # comparisons are written so that NaN fails them
        if not self.half_life > 0:
            raise ValueError(f"half_life must be a positive number of tokens, not {self.half_life}")
        if not 0 <= self.weight_low <= self.weight_high:
            raise ValueError(
                f"the weight range needs 0 <= weight_low <= weight_high, not [{self.weight_low}, {self.weight_high}]"
            )
        if not self.safety_threshold > 0:
            raise ValueError(f"safety_threshold must be positive, not {self.safety_threshold}")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low must lie in [0, 1), not {self.clip_low}")
        if not 0 <= self.clip_high < float("inf"):
            raise ValueError(f"clip_high must be a finite number from 0 up, not {self.clip_high}")

    @classmethod
    def preset(cls, name: str) -> "FipoConfig":
        """The published recipes: fipo-32b, fipo-7b, dapo."""
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, not {name!r}")
        return cls(**_PRESETS[name])

    @classmethod
    def clipped_ratio(cls, clip_low: float, clip_high: float, normalization: str) -> "FipoConfig":
        """PPO's clipped ratio and nothing else: f = 1, no dual clip, no filter."""
        return cls(
            weight_low=1.0,
            weight_high=1.0,
            clip_low=clip_low,
            clip_high=clip_high,
            semantics="paper",
            normalization=normalization,
            sequence_filter=False,
        )

    @property
    def is_paper(self) -> bool:
        return self.semantics == "paper"

    @property
    def resolved_normalization(self) -> str:
        return self.normalization or ("group" if self.is_paper else "token")

    @property
    def filters_sequences(self) -> bool:
        return not self.is_paper if self.sequence_filter is None else self.sequence_filter

    @property
    def gamma(self) -> float:
        """Discount per token, in double."""
        return 2.0 ** (-1.0 / self.half_life)


@dataclass(frozen=True)
class RatioConfig:
    """A loss whose ratio is not that of `FipoConfig`, see policy_gradient.py. Raises ValueError if out of range.

    kind: "gspo" or "cispo".
    clip_low, clip_high: the kind's ratio is clipped to [1 - clip_low, 1 + clip_high].
    normalization: "token", "group" or "sequence".
    """

    kind: str
    clip_low: float
    clip_high: float
    normalization: str

    def __post_init__(self) -> None:
        if self.kind not in RATIOS:
            raise ValueError(f"kind must be one of {', '.join(RATIOS)}, not {self.kind!r}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, not {self.normalization!r}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must lie in [0, 1], not {self.clip_low}")
        if not 0 <= self.clip_high < float("inf"):
            raise ValueError(f"clip_high must be a finite number from 0 up, not {self.clip_high}")

    @property
    def resolved_normalization(self) -> str:
        return self.normalization


@dataclass(frozen=True)
class LossConfig:
    """What an update minimises for each response token: a policy-gradient loss + kl_weight KL - entropy_weight H.

    policy: the policy-gradient loss.
    kl_weight, kl_estimator: of the KL to the reference model, see kl.py; weight 0 leaves it out.
    entropy_weight: of the entropy bonus; 0 leaves it out. Raises ValueError for values out of range.
    """

    policy: FipoConfig | RatioConfig = FipoConfig()
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        check_estimator(self.kl_estimator)
        for name, weight in (("kl_weight", self.kl_weight), ("entropy_weight", self.entropy_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must be a finite number from 0 up, not {weight}")
        if self.kl_weight and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 has no gradient in expectation: use k2 or k3, or the KL in the reward")

    @property
    def influence(self) -> FipoConfig | None:
        """The settings of the influence weight; None where f is 1 or there is none."""
        policy = self.policy
        if isinstance(policy, FipoConfig) and (policy.weight_low, policy.weight_high) != (1.0, 1.0):
            return policy
        return None

    @property
    def clips_twice(self) -> bool:
        """Whether the loss has a dual clip."""
        return isinstance(self.policy, FipoConfig) and not self.policy.is_paper

    @property
    def resolved_normalization(self) -> str:
        return self.policy.resolved_normalization
