"""What two vectors of the same texts tell about each other, as a loss that drives them apart."""

from __future__ import annotations

from torch import Tensor

from emblas.losses import checks


def information_bound(y: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    r"""Upper bound of the mutual information of ``y`` and what ``mean`` is predicted from (vCLUB).

    With :math:`q(y | x_i)` the normal distribution of mean :math:`\mu_i` and variances
    :math:`\sigma_i^2 = e^{s_i}`, which a network predicts from :math:`x_i`,

    .. math:: \frac1n \sum_i \log q(y_i | x_i) - \frac1{n^2} \sum_{ij} \log q(y_j | x_i):

    how much better the own vector is predicted than those of other texts.

    Parameters
    ----------
    y : Tensor
        Vectors ``(n, dim)``: one view of each text.
    mean, log_variance : Tensor
        :math:`\mu` and :math:`s`, ``(n, dim)``: predicted from another view of the same texts.

    Returns
    -------
    Tensor
        Scalar, in float32 (float64 for float64); 0 for no texts. It is a bound of the mutual
        information as far as the prediction is good, and may be negative where it is not.

    Raises
    ------
    TypeError, ValueError
        If arguments don't fit together, or hold NaN or infinity.

    Notes
    -----
    Cheng et al. 2020, arXiv 2006.12013 (section 3.2). The sum over all pairs is one over the texts,
    since :math:`\frac1n \sum_j (y_j - \mu_i)^2 = (\bar y - \mu_i)^2 + \mathrm{var}(y)`: time and
    memory are linear in ``n``.

    It is what PDF (arXiv 2511.01588) minimizes between the views of
    :class:`emblas.encoder.ParallelPrefixes`. The predicting network is trained beside, by
    ``torch.nn.functional.gaussian_nll_loss(mean, y, log_variance.exp(), full=True)`` of detached
    vectors; of this loss, it gets no step.

    Examples
    --------
    >>> y = torch.tensor([[1.0], [-1.0]])
    >>> information_bound(y, y, torch.zeros(2, 1))
    tensor(1.)
    """
    checks.vectors("y", y)
    checks.values("mean", mean, y, tuple(y.shape))
    checks.values("log_variance", log_variance, y, tuple(y.shape))
    dtype = checks.accumulator(y, mean, log_variance)
    with checks.full_precision(y):
        own, predicted, spread = (x.to(dtype) for x in (y, mean, log_variance))
        n = max(y.shape[0], 1)
        center = own.sum(0) / n
        own, predicted = own - center, predicted - center
        # The distances of all vectors from the prediction, in the mean, less that of the own one.
        gap = own.square().sum(0) / n + 2 * own * predicted - own.square()
        return (gap * (-spread).exp()).sum() / (2 * n)
