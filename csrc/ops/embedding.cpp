// The lookup in a packed table: schema, argument checks, memory and threads.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/woq.h"

namespace ipex_quant {
namespace {

template <class Id>
void copy_ids(const Tensor& ids, std::vector<int64_t>& rows) {
  const Id* data = static_cast<const Id*>(ids.const_data_ptr());
  rows.assign(data, data + ids.numel());
}

// A checked copy of the ids: writes by another thread cannot make them out of bounds.
std::vector<int64_t> rows_of(const Tensor& ids, int64_t count) {
  check_cpu("ids", ids);
  const ScalarType type = ids.scalar_type();
  IPEX_QUANT_CHECK(type == ScalarType::Long || type == ScalarType::Int, "ids: expected dtype int64 or int32, got ",
                   torch::headeronly::toString(type));
  std::vector<int64_t> rows;
  if (type == ScalarType::Long)
    copy_ids<int64_t>(as_contiguous(ids), rows);
  else
    copy_ids<int32_t>(as_contiguous(ids), rows);
  check_indices("ids", rows.data(), int64_t(rows.size()), count);
  return rows;
}

Tensor woq_embedding(Tensor packed, Tensor ids, std::optional<Tensor> perm, int64_t embedding_dim, ScalarType dtype) {
  const WoqHeader h = read_header(packed);
  const WoqGeometry g = geometry_of(h, packed);
  IPEX_QUANT_CHECK(embedding_dim == g.k, "embedding_dim: expected ", g.k, ", got ", embedding_dim);
  const FloatType type = float_type("dtype", dtype);
  const int32_t* order = permutation_data(perm, g.k);
  const std::vector<int64_t> rows = rows_of(ids, g.n);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(g.k);
  Tensor y = torch::stable::empty(shape, dtype);
  const uint8_t* tiles = static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof h;
  const GatherArgs args{&g, tiles, order, rows.data(), type, y.mutable_data_ptr()};
  const KernelTable& table = kernels();
  parallel(int64_t(rows.size()), 1 + (int64_t(1) << 13) / g.k, [&](int64_t begin, int64_t end) {
    table.gather_rows(args, begin, end, make_buffer(gather_scratch(g)).get());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ipex_quant, m) {
  m.def("woq_embedding(Tensor packed, Tensor ids, Tensor? perm, int embedding_dim, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ipex_quant, CPU, m) { m.impl("woq_embedding", TORCH_BOX(&woq_embedding)); }

}  // namespace ipex_quant
