// SPDX-License-Identifier: MIT
// L0: whoever has called for a long piece of work may end it. It asks now and then, between pieces, on the thread that was called.
#pragma once

#include <chrono>

namespace chainrule {

// While it lives, the calling thread asks so; what `ask` throws ends the work, which is to leave nothing half done.
class Interruptible {
   public:
    using Ask = void (*)();
    explicit Interruptible(Ask ask) : before_(now_) { now_ = {ask, {}}; }
    ~Interruptible() { now_ = before_; }
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

    // Asks every 20 ms or so. Looking at the clock takes 25 ns.
    static void look_up() {
        if (!now_.ask) return;
        const auto time = Clock::now();
        if (now_.last == Clock::time_point{}) now_.last = time;
        if (time - now_.last < std::chrono::milliseconds(20)) return;
        now_.last = time;
        now_.ask();
    }

   private:
    using Clock = std::chrono::steady_clock;
    struct State {
        Ask ask;
        Clock::time_point last;
    };
    inline static thread_local State now_{nullptr, {}};
    const State before_;
};

}  // namespace chainrule
