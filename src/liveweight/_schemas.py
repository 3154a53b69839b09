"""The signature of every op, as the torch dispatcher reads it."""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "activity_stats_": """(
        Tensor(a!) stats,
        Tensor x,
        float eps,
        int channels=0
    ) -> ()""",
    "patch_gram": """(
        Tensor x,
        int[2] kernel_size,
        int[2] stride,
        int[4] padding,
        int[2] dilation
    ) -> Tensor""",
    "gram_norms_": """(
        Tensor(a!) sums,
        Tensor gram,
        Tensor weight
    ) -> ()""",
    "mass_mask": """(
        Tensor scores,
        float alpha,
        bool authors_ties,
        bool packed=False
    ) -> Tensor""",
    "signal_mask": """(
        Tensor weight,
        Tensor activity,
        Tensor? bias,
        float alpha,
        bool authors_ties,
        bool packed
    ) -> (Tensor, Tensor)""",
    "top_k_mask": """(
        Tensor scores,
        int k,
        bool per_row,
        Tensor? sizes,
        bool packed
    ) -> Tensor""",
    "unstructured_linear": """(
        Tensor x,
        Tensor values,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        Tensor bits,
        int[2] tile,
        int out_features,
        Tensor? bias,
        int activation,
        bool batch_last
    ) -> Tensor""",
    "unstructured_linear_grad_x": """(
        Tensor grad,
        Tensor values,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        int[2] tile,
        int in_features
    ) -> Tensor""",
    "unstructured_linear_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        int[2] tile
    ) -> Tensor""",
    "bitmap_linear": """(
        Tensor x,
        Tensor values,
        Tensor bits,
        Tensor offsets,
        int[2] shape,
        int most,
        Tensor? bias,
        int activation
    ) -> Tensor""",
    "bitmap_to_dense": """(
        Tensor values,
        Tensor bits,
        Tensor offsets,
        int[2] shape,
        int most
    ) -> Tensor""",
    "bitmap_linear_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor values,
        Tensor bits,
        Tensor offsets,
        int[2] shape,
        int most
    ) -> Tensor""",
    "delta_linear": """(
        Tensor x,
        Tensor values,
        Tensor deltas,
        Tensor starts,
        Tensor order,
        Tensor offsets,
        int[2] shape,
        int[5] layout,
        Tensor? bias,
        int activation
    ) -> Tensor""",
    "delta_linear_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor values,
        Tensor deltas,
        Tensor starts,
        Tensor order,
        Tensor offsets,
        int[2] shape,
        int[5] layout
    ) -> Tensor""",
    "delta_to_dense": """(
        Tensor values,
        Tensor deltas,
        Tensor starts,
        Tensor order,
        Tensor offsets,
        int[2] shape,
        int[5] layout
    ) -> Tensor""",
    "block_linear": """(
        Tensor x,
        Tensor values,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[2] shape,
        Tensor? bias,
        int activation,
        bool batch_last
    ) -> Tensor""",
    "block_linear_grad_x": """(
        Tensor grad,
        Tensor values,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[2] shape
    ) -> Tensor""",
    "block_linear_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[2] block
    ) -> Tensor""",
    "kernelwise_conv2d": """(
        Tensor x,
        Tensor values,
        Tensor filter_offsets,
        Tensor channels,
        Tensor? bias,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups,
        bool relu,
        int pool,
        int layout
    ) -> Tensor""",
    "kernelwise_conv2d_grad_x": """(
        Tensor grad,
        Tensor values,
        Tensor filter_offsets,
        Tensor channels,
        int[4] x_shape,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "kernelwise_conv2d_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor filter_offsets,
        Tensor channels,
        int[2] kernel_size,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "unstructured_conv2d": """(
        Tensor x,
        Tensor values,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        int[4] shape,
        int[2] tile,
        Tensor? bias,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups,
        bool relu,
        int pool,
        int layout
    ) -> Tensor""",
    "unstructured_conv2d_grad_x": """(
        Tensor grad,
        Tensor values,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        int[4] shape,
        int[2] tile,
        int[4] x_shape,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "unstructured_conv2d_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor columns,
        Tensor segments,
        Tensor offsets,
        int[4] shape,
        int[2] tile,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "block_conv2d": """(
        Tensor x,
        Tensor values,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[4] shape,
        Tensor? bias,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups,
        bool relu
    ) -> Tensor""",
    "block_conv2d_grad_x": """(
        Tensor grad,
        Tensor values,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[4] shape,
        int[4] x_shape,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "block_conv2d_grad_values": """(
        Tensor grad,
        Tensor x,
        Tensor row_offsets,
        Tensor columns,
        Tensor schedule,
        int[4] shape,
        int[2] block,
        int[2] stride,
        int[2] padding,
        int[2] dilation,
        int groups
    ) -> Tensor""",
    "pack_mask_bits": """(
        Tensor mask
    ) -> Tensor""",
    "masked_linear": """(
        Tensor x,
        Tensor weight,
        Tensor mask_bits,
        Tensor? bias
    ) -> Tensor""",
    "masked_linear_grad_x": """(
        Tensor grad,
        Tensor weight,
        Tensor mask_bits
    ) -> Tensor""",
    "masked_linear_grad_weight": """(
        Tensor grad,
        Tensor x,
        Tensor mask_bits
    ) -> Tensor""",
    "semi_structured_linear": """(
        Tensor x,
        Tensor values,
        Tensor meta,
        int out_features,
        Tensor? bias,
        int activation,
        bool batch_last
    ) -> Tensor""",
    "semi_structured_torch_linear": """(
        Tensor x,
        Tensor values,
        Tensor meta,
        int out_features,
        Tensor? bias,
        int activation,
        bool batch_last,
        str backend
    ) -> Tensor""",
    "semi_structured_pack": """(
        Tensor weight,
        Tensor? mask
    ) -> (Tensor, Tensor, Tensor)""",
    "semi_structured_to_dense": """(
        Tensor values,
        Tensor meta,
        int[2] shape
    ) -> Tensor""",
    "semi_structured_take": """(
        Tensor dense,
        Tensor meta
    ) -> Tensor""",
}
