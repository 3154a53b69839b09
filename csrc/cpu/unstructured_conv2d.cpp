// y = pool(act(conv2d(x, W) + b)) where single entries of W are missing.
//
// Direct, without im2col; see unstructured_conv2d.h. Any strides of x are read as they are, y comes
// contiguous, channels last or batch last. The order of a sum never depends on threads.
#include "unstructured_conv2d_run.h"

namespace liveweight {

struct PoolJob {
  int64_t rows, columns, pool;  // of the output
  PlaneStrides from, to;
};

}  // namespace liveweight

LW_DECLARE(void pool_plane(const float* in, const PoolJob& job, float* out))

namespace liveweight::LW_ISA {

// Largest of each pool x pool square of one plane; NaN when any is.
void pool_plane(const float* in, const PoolJob& job, float* out) {
  for (int64_t r = 0; r < job.rows; ++r) {
    for (int64_t c = 0; c < job.columns; ++c) {
      const float* corner = in + r * job.pool * job.from.row + c * job.pool * job.from.column;
      float best = corner[0];
      for (int64_t i = 0; i < job.pool; ++i) {
        for (int64_t j = 0; j < job.pool; ++j) {
          best = max_or_nan(best, corner[i * job.from.row + j * job.from.column]);
        }
      }
      out[r * job.to.row + c * job.to.column] = best;
    }
  }
}

}  // namespace liveweight::LW_ISA

#ifdef LW_BASE
namespace liveweight {
namespace {

// Strides of a new [B, C, H, W] in a layout: 0 contiguous, 1 channels last, 2 batch last.
PlaneStrides lay_out(int64_t layout, int64_t B, int64_t C, int64_t H, int64_t W) {
  B = std::max<int64_t>(B, 1), C = std::max<int64_t>(C, 1);
  if (layout == 1) return {C * H * W, 1, W * C, C};
  if (layout == 2) return {1, H * W * B, W * B, B};
  return {C * H * W, H * W, W, 1};
}

// New tensor [B, C, H, W] like x with those strides.
Tensor new_planes(const Tensor& x, int64_t layout, int64_t B, int64_t C, int64_t H, int64_t W) {
  if (layout == 1) {
    return torch::stable::transpose(
        torch::stable::transpose(torch::stable::new_empty(x, {B, H, W, C}), 1, 3), 2, 3);
  }
  if (layout == 2) {
    Tensor y = torch::stable::new_empty(x, {C, H, W, B});
    for (int64_t d = 3; d > 0; --d) y = torch::stable::transpose(y, d - 1, d);
    return y;
  }
  return torch::stable::new_empty(x, {B, C, H, W});
}

void pool_planes(const float* in, const PoolJob& job, int64_t B, int64_t filters, float* out) {
  const int64_t threads = B * filters * job.rows * job.columns < 20000 ? 1 : torch::stable::get_num_threads();
  parallel_for(B * filters, (B * filters + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / filters, o = i % filters;
      LW_SELECT(pool_plane)(in + b * job.from.sample + o * job.from.channel, job,
                            out + b * job.to.sample + o * job.to.channel);
    }
  });
}

Tensor unstructured_conv2d(const Tensor& x, const Tensor& values, const Tensor& columns,
                           const Tensor& segments, const Tensor& offsets, std::vector<int64_t> shape,
                           std::vector<int64_t> tile, const std::optional<Tensor>& bias,
                           std::vector<int64_t> stride, std::vector<int64_t> padding,
                           std::vector<int64_t> dilation, int64_t groups, bool relu, int64_t pool,
                           int64_t layout) {
  const char* op = "unstructured_conv2d";
  const float* from = check_planes(op, "x", x, {});
  const float* data = checked_data<float>(op, "values", values, 1, ScalarType::Float);
  const SparseTiles w = check_tiles(op, data, values.numel(), columns, segments, offsets, shape, tile);
  const ConvSizes s = conv_sizes(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, shape[0],
                                 {shape[2], shape[3]}, stride, padding, dilation, groups);
  LW_CHECK(s.C == shape[1] * groups, op, ": expected ", shape[1] * groups, " channels, got ", s.C);
  LW_CHECK(pool >= 1 && pool <= std::min(s.height, s.width), op, ": cannot pool ", s.height, " x ",
           s.width, " by ", pool);
  LW_CHECK(layout >= 0 && layout <= 2, op, ": layout must be 0, 1 or 2");
  const float* shift = nullptr;
  if (bias) {
    shift = checked_data<float>(op, "bias", *bias, 1, ScalarType::Float);
    LW_CHECK(bias->numel() == s.filters, op, ": expected bias [", s.filters, "], got ", shape_of(*bias));
  }
  const int64_t rows = s.height / pool, columns_out = s.width / pool;
  Tensor y = new_planes(x, layout, s.B, s.filters, rows, columns_out);
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const PlaneStrides to = lay_out(layout, s.B, s.filters, rows, columns_out);
  const TileInput input = forward_input(s, from, strides_of(x));
  if (pool == 1) {
    TileConv(input, {s.height, s.width, to}, w, s.filters, groups, shift, relu).run(out);
    return y;
  }
  // Rows and columns that no pool uses are not computed.
  const int64_t height = rows * pool, width = columns_out * pool;
  const PlaneStrides whole = lay_out(layout, s.B, s.filters, height, width);
  Workspace<float> before(s.B * s.filters * height * width + kSlack);
  TileConv(input, {height, width, whole}, w, s.filters, groups, shift, relu).run(before.data());
  pool_planes(before.data(), {rows, columns_out, pool, whole, to}, s.B, s.filters, out);
  return y;
}

}  // namespace
}  // namespace liveweight

STABLE_TORCH_LIBRARY_IMPL(liveweight, CPU, m) {
  m.impl("unstructured_conv2d", TORCH_BOX(&liveweight::unstructured_conv2d));
}
#endif  // LW_BASE
