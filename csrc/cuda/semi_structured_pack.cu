// Launchers and registration of semi_structured_pack, _to_dense and _take for CUDA.
#include "semi_structured_pack.cuh"

#include <tuple>

#include "torch_ops.cuh"

namespace liveweight::cuda::two_of_four {
namespace {

constexpr int64_t kMostBlocks = 132 * 16;  // of kPackThreads: enough loads in flight

DenseShape shape_of(const Tensor& dense) {
  const int64_t N = dense.size(0), K = dense.size(1);
  const int64_t R = (N + kTileRows - 1) / kTileRows, U = (K + kTileColumns - 1) / kTileColumns;
  return {N, K, U, R * U, K % 4 == 0 && misalignment(dense) % 8 == 0};
}

Shape blocks_for(int64_t tiles) {
  constexpr int kWarps = kPackThreads / 32;
  const int64_t blocks = (tiles + kWarps - 1) / kWarps;
  return {grid(blocks < kMostBlocks ? blocks : kMostBlocks), kPackThreads};
}

void check_halves(const char* op, const char* name, const Tensor& x) {
  with_type<Bf16, Half>(op, name, x, [](auto) {});
}

std::tuple<Tensor, Tensor, Tensor> pack_cuda(const Tensor& weight,
                                             const std::optional<Tensor>& mask) {
  constexpr const char* kOp = "semi_structured_pack";
  check_halves(kOp, "weight", weight);
  check_tensor(kOp, "weight", weight, weight.scalar_type(), {-1, -1}, weight);
  check_tensor(kOp, "mask", mask, ScalarType::Bool, {weight.size(0), weight.size(1)}, weight);
  const OnDevice guard(weight);
  DenseShape shape = shape_of(weight);
  const int64_t R = (shape.rows + kTileRows - 1) / kTileRows, U = shape.tile_columns;
  const Tensor values = empty(weight, {R, U, kTileSteps, 32, 8}, weight.scalar_type());
  const Tensor meta = empty(weight, {R, U, 32, 2}, ScalarType::Int);
  Tensor crowded = empty(weight, {1}, ScalarType::Int);
  torch::stable::zero_(crowded);
  if (shape.tiles > 0) {
    if (mask && misalignment(*mask) % 4) shape.aligned = false;
    const PackOperands out{typed<const uint16_t>(weight), typed<const uint8_t>(mask), shape,
                           typed<Vector16>(values), typed<Vector8>(meta), typed<int>(crowded)};
    launcher(weight)(pack_semi_structured, blocks_for(shape.tiles), out);
  }
  return {values, meta, crowded};
}

Tensor to_dense_cuda(const Tensor& values, const Tensor& meta, std::vector<int64_t> size) {
  constexpr const char* kOp = "semi_structured_to_dense";
  check_halves(kOp, "values", values);
  require(size.size() == 2 && size[0] >= 0 && size[1] >= 0, kOp, "shape must be (N, K)");
  const Tensor dense = empty(values, {size[0], size[1]}, values.scalar_type());
  const DenseShape shape = shape_of(dense);
  const int64_t R = (size[0] + kTileRows - 1) / kTileRows, U = shape.tile_columns;
  check_tensor(kOp, "values", values, values.scalar_type(), {R, U, kTileSteps, 32, 8}, values,
               true);
  check_tensor(kOp, "meta", meta, ScalarType::Int, {R, U, 32, 2}, values, true);
  if (shape.tiles == 0) return dense;
  const OnDevice guard(values);
  const MoveOperands<false> in{typed<uint16_t>(dense), shape, typed<const Vector16>(values),
                               typed<const Vector8>(meta)};
  launcher(values)(move_semi_structured<false>, blocks_for(shape.tiles), in);
  return dense;
}

Tensor take_cuda(const Tensor& dense, const Tensor& meta) {
  constexpr const char* kOp = "semi_structured_take";
  check_halves(kOp, "dense", dense);
  check_tensor(kOp, "dense", dense, dense.scalar_type(), {-1, -1}, dense);
  const DenseShape shape = shape_of(dense);
  const int64_t R = (shape.rows + kTileRows - 1) / kTileRows, U = shape.tile_columns;
  check_tensor(kOp, "meta", meta, ScalarType::Int, {R, U, 32, 2}, dense, true);
  const Tensor values = empty(dense, {R, U, kTileSteps, 32, 8}, dense.scalar_type());
  if (shape.tiles == 0) return values;
  const OnDevice guard(dense);
  const MoveOperands<true> in{typed<const uint16_t>(dense), shape, typed<Vector16>(values),
                              typed<const Vector8>(meta)};
  launcher(dense)(move_semi_structured<true>, blocks_for(shape.tiles), in);
  return values;
}

}  // namespace
}  // namespace liveweight::cuda::two_of_four

LW_CUDA_LIBRARY(m) {
  m.impl("semi_structured_pack", TORCH_BOX(&liveweight::cuda::two_of_four::pack_cuda));
  m.impl("semi_structured_to_dense", TORCH_BOX(&liveweight::cuda::two_of_four::to_dense_cuda));
  m.impl("semi_structured_take", TORCH_BOX(&liveweight::cuda::two_of_four::take_cuda));
}
