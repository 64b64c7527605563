// Calls one function of the kernels' library, which may be for another CPU: this then runs in an emulator. Standard
// input has the arguments, an array as its size and its contents; standard output gets all arrays, as they are after it.

#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "functions.h"  // the library's, declared by test_other_cpus.py

std::vector<std::pair<char*, long>> arrays;

template <class Argument>
Argument read() {
  if constexpr (std::is_pointer_v<Argument>) {
    using Element = std::remove_const_t<std::remove_pointer_t<Argument>>;
    const long size = read<long>();
    if (size < 0) return nullptr;
    if constexpr (std::is_pointer_v<Element>) {
      auto* list = new Element[size];
      for (long i = 0; i < size; i++) list[i] = read<Element>();
      return list;
    } else {
      arrays.emplace_back(new char[size], size);
      std::fread(arrays.back().first, 1, size, stdin);
      return (Argument)arrays.back().first;
    }
  } else {
    Argument value;
    std::fread(&value, sizeof value, 1, stdin);
    return value;
  }
}

template <class... Arguments>
void call(void (*function)(Arguments...)) {
  std::apply(function, std::tuple<Arguments...>{read<Arguments>()...});  // braces: from first to last
  for (auto [array, size] : arrays) std::fwrite(array, 1, size, stdout);
}

int main(int, char** arguments) {
#define CALL(function) \
  if (!std::strcmp(arguments[1], #function)) call(function)
  CALL(gru_forward);
  CALL(gru_backward);
  CALL(batch_norm_moments);
  CALL(batch_norm_output);
  CALL(batch_norm_sums);
  CALL(batch_norm_gradient);
}
