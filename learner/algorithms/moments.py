"""Mean and standard deviation of numbers that are seen in parts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of all numbers so far. In float64, where numbers that are all the same float32 deviate by exactly 0."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Of every element of a tensor of any shape; of none, it is as fresh as Moments()."""
        if values.numel() == 0:
            return cls()
        exact = values.double()
        mean = exact.sum() / exact.numel()
        return cls(count=float(exact.numel()), mean=float(mean), squares=float((exact - mean).square().sum()))

    def merged(self, other: "Moments") -> "Moments":
        """As if both had been seen together: Chan, Golub and LeVeque 1979."""
        count = self.count + other.count
        if not count:
            return self
        difference = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + difference * other.count / count,
            squares=self.squares + other.squares + difference**2 * self.count * other.count / count,
        )

    @property
    def std(self) -> float:
        """Of the population: no degree of freedom is taken off; 0 when nothing was seen."""
        return float((self.squares / self.count) ** 0.5) if self.count else 0.0

    def normalize(self, values: Tensor, *, epsilon: float = 1e-6) -> Tensor:
        """(values - mean) / (std + epsilon), in the dtype of `values`: 0 where nothing ever differed from the mean."""
        return ((values.double() - self.mean) / (self.std + epsilon)).to(values.dtype)
