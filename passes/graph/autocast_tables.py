"""Which operators run in which dtype: the lists of `torch.autocast`, as torch publishes them.

Source: "Autocast Op Reference" in the documentation of torch.amp, and for the operators that it
does not name, what torch registers for the dispatch keys AutocastCPU and AutocastCUDA.

lower    inputs are cast to the compute dtype
fp32     inputs are cast to fp32
widest   inputs are cast to the widest dtype among them

All other operators run in the dtype of their inputs, by torch's type promotion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_PRODUCTS = (
    "addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d "
    "conv_transpose3d _convolution linalg_vecdot linear matmul mm scaled_dot_product_attention"
)
_LOSSES = (
    "cosine_embedding_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss "
    "mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d poisson_nll_loss "
    "smooth_l1_loss soft_margin_loss triplet_margin_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits cross_entropy_loss"
)
# not in torch 2.11; what is registered has no public name
_RMS_NORM = (
    "rms_norm"
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
    else ""
)


@dataclass(frozen=True)
class Table:
    """Names of ATen operators, overloads of one name alike."""

    lower: frozenset[str]
    fp32: frozenset[str]
    widest: frozenset[str]


def _table(lower: str, fp32: str, widest: str) -> Table:
    return Table(*(frozenset(names.split()) for names in (lower, fp32, widest)))


TABLES = {
    "cpu": _table(
        # einsum and tensordot are made of products
        f"{_PRODUCTS} _addmm_activation _native_multi_head_attention mkldnn_rnn_layer einsum "
        "tensordot",
        f"{_LOSSES} ctc_loss multilabel_margin_loss_forward "
        "adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d fractional_max_pool2d "
        "fractional_max_pool3d max_pool3d max_unpool2d max_unpool3d "
        "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d "
        "grid_sampler grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback "
        "cdist fake_quantize_per_tensor_affine nanquantile polar prelu prod quantile stft trace "
        "view_as_complex "
        "fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ihfft fft_irfft "
        "fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn "
        "_lu_with_info cholesky cholesky_inverse cholesky_solve geqrf inverse linalg_cholesky "
        "linalg_cholesky_ex linalg_cond linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh "
        "linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank "
        "linalg_matrix_sqrth linalg_qr linalg_solve linalg_svd linalg_svdvals linalg_tensorinv "
        "linalg_tensorsolve lu_solve orgqr ormqr pinverse qr svd triangular_solve",
        "cat stack index_copy",
    ),
    "cuda": _table(
        f"{_PRODUCTS} _scaled_dot_product_flash_attention _thnn_fused_gru_cell "
        "_cudnn_rnn _thnn_fused_lstm_cell addmv addr chain_matmul convolution cudnn_convolution "
        "cudnn_convolution_transpose einsum gru_cell linalg_multi_dot lstm_cell mv prelu "
        "rnn_relu_cell rnn_tanh_cell",
        f"{_LOSSES} "
        "acos asin cosh erfinv exp expm1 log log10 log1p log2 pow reciprocal rsqrt sinh softplus "
        "tan cdist cosine_similarity cumprod cumsum dist frobenius_norm group_norm layer_norm "
        "linalg_matrix_norm linalg_matrix_sqrth linalg_vector_norm log_softmax logsumexp "
        "native_layer_norm norm nuclear_norm pdist prod renorm softmax sum "
        f"{_RMS_NORM} "
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_bicubic2d "
        "upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d upsample_trilinear3d",
        "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot "
        "vdot",
    ),
}
TO_FP32_BY_DTYPE = {
    *("cumprod", "cumsum", "prod", "sum", "softmax", "log_softmax"),
    *("linalg_matrix_norm", "linalg_vector_norm", "norm"),
}
"""Of those in fp32, the ones that take a ``dtype``: they get it instead of a cast, and where the
model gives them one they are left alone."""
