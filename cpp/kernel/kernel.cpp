// SPDX-License-Identifier: Apache-2.0
//
// The table of one variant. CMakeLists.txt compiles this file once per instruction set, and the
// rest of the folder with it: online_softmax.h has the algorithm, row_block.h its rows in blocks,
// decode.h the way for few queries, short.h the one for few rows and keys, backward.h the
// gradients, statistics.h what probabilities say, linear.h the products of a model's weights,
// layers.h its other layers.
#include "kernel.h"

#include "backward.h"
#include "decode.h"
#include "layers.h"
#include "linear.h"
#include "partials.h"
#include "probes.h"
#include "row_block.h"
#include "short.h"
#include "statistics.h"

namespace fastattn {
namespace {

template <class T>
constexpr Functions functions = {
    .lanes = Vec<T>::lanes,
    .query_tile = Layout<T>::tile_rows,
    .key_tile = int(kKeyTile),
    .scratch_bytes = scratch_bytes<T>,
    .kept_bytes = kept_bytes<T>,
    .begin_keeping = begin_keeping<T>,
    .attend = attend<T>,
    .count = count_tiles<T>,
    .decode = {.most_rows = kMostDecodeRows,
               .scratch_bytes = decode_scratch_bytes<T>,
               .attend = decode<T>,
               .partial_bytes = Partials<T>::bytes,
               .merge = merge_partials<T>,
               .finish = finish_partials<T>},
    .shorts = short_functions<T>,
    .gradients = gradients<T>,
    .statistics = statistics_functions<T>,
    .fma = run_fma<T>,
};

}  // namespace

extern const Kernel FASTATTN_KERNEL;
const Kernel FASTATTN_KERNEL = {
    .isa = FASTATTN_ISA_NAME,
    .float32 = functions<float>,
    .float64 = functions<double>,
    .linear = {kFewLinearRows, kMostFeatures, linear_scratch_bytes, multiply_linear},
    .layers = layer_functions,
    .fma_bfloat16 = run_fma<float, kMultipliesPairs>,
    .read = read_bytes,
};

}  // namespace fastattn
